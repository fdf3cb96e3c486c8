"""Router outputs are parsed by shape, dtype and, with K = E, by name; a class that FSDP2 renamed keeps its format."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equipoise.external.output_formats import FORMATS, entries_of, format_of, parse_output, part_expressions

E, K, T = 8, 2, 5
LOGITS, WEIGHTS, IDS = torch.randn(T, E), torch.rand(T, K), torch.randint(E, (T, K))
Named = namedtuple("Named", "weights router_logits ids")


def parse(output: Any, **options: Any) -> Any:
    return parse_output(nn.Identity(), (), {}, output, **options)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_dynamic_subclass_has_the_format_of_its_class(name: str) -> None:
    """FSDP2 replaces the class of a module by a subclass of another name."""
    original = type(name, (nn.Module,), {})
    assert format_of(type(f"FSDP{name}", (original,), {})()) == format_of(original()) == FORMATS[name]


@pytest.mark.parametrize("replace_ids", [False, True])
def test_replacing_keeps_everything_else(replace_ids: bool) -> None:
    output = {"ids": IDS.int(), "aux": 1.5, "z": LOGITS.view(1, T, E), "w": WEIGHTS}
    parsed = parse(output)
    assert torch.equal(parsed.parts.ids_TK, IDS) and torch.equal(parsed.parts.logits_TE, LOGITS)
    new = parsed.replace(WEIGHTS * 2, IDS.flip(-1) if replace_ids else None)
    assert list(new) == list(output) and new["z"] is output["z"] and new["aux"] == 1.5
    assert torch.equal(new["w"], 2 * output["w"]) and new["ids"].dtype == torch.int32
    assert torch.equal(new["ids"], IDS.flip(-1).int() if replace_ids else IDS.int())
    assert output["w"].data_ptr() == WEIGHTS.data_ptr(), "the given output is left as it was"


def square() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, weights and ids with K = E."""
    logits = torch.randn(T, 4)
    weights, ids = logits.softmax(dim=-1).topk(4)
    return logits, weights, ids


@dataclasses.dataclass
class Output:
    scores: Tensor
    gate_logits: Tensor
    indices: Tensor


@pytest.mark.parametrize("kind", ["dict", "named tuple", "dataclass"])
def test_with_k_equal_to_e_a_name_tells_the_logits(kind: str) -> None:
    """The weights come first here, where position alone would take them for the logits."""
    logits, weights, ids = square()
    output: Any = {
        "dict": {"weights": weights, "logits": logits, "ids": ids},
        "named tuple": Named(weights, logits, ids),
        "dataclass": Output(weights, logits, ids),
    }[kind]
    for swapped in (False, True):
        parsed = parse(output, swapped=swapped)
        assert parsed.parts.logits_TE is logits and parsed.parts.weights_TK is weights
        assert not parsed.ambiguous
    changed = parsed.replace(2 * weights, None)
    assert torch.equal(parse(changed).parts.weights_TK, 2 * weights)
    assert parse(changed).parts.logits_TE is logits


def test_with_k_equal_to_e_and_no_name_the_caller_has_to_find_out() -> None:
    logits, weights, ids = square()
    first, second = parse((weights, logits, ids)), parse((weights, logits, ids), swapped=True)
    assert first.ambiguous and second.ambiguous
    assert first.parts.logits_TE is weights and second.parts.logits_TE is logits
    assert not parse((LOGITS, WEIGHTS, IDS)).ambiguous


def test_a_choice_that_skips_the_layer_is_one_of_the_last_expert() -> None:
    router = type("ZayaRouter", (nn.Module,), {})()
    ids, weights = torch.tensor([[0], [0], [3]]), torch.tensor([[0.0], [0.4], [0.5]])
    parsed = parse_output(router, (), {}, (torch.randn(3, 5), weights, ids))
    assert parsed is not None and parsed.parts.ids_TK.tolist() == [[4], [0], [3]]


def test_scattered_scores_are_gathered_and_scattered_again() -> None:
    router = type("Llama4Router", (nn.Module,), {"top_k": 2})()
    scores = torch.zeros(T, E).scatter(-1, LOGITS.topk(2).indices, LOGITS.topk(2).values.sigmoid())
    parsed = parse_output(router, (), {}, (scores, LOGITS))
    assert parsed is not None
    again, logits = parsed.replace(parsed.parts.weights_TK, None)
    assert torch.equal(again, scores) and logits is LOGITS


def test_expressions_evaluate_to_the_parts() -> None:
    for output in ((IDS, WEIGHTS, LOGITS), Output(WEIGHTS, LOGITS, IDS), {"a": LOGITS, "b": IDS, "c": WEIGHTS}):
        expressions = part_expressions(output)
        assert expressions is not None
        parts = [eval(expression, {"output": output}) for expression in expressions]
        assert parts[0] is LOGITS and parts[1] is WEIGHTS and parts[2] is IDS
    assert part_expressions(LOGITS) is None and entries_of(LOGITS) is None


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0), (1, 2, 0)])
def test_parts_are_known_by_shape_and_type_in_any_order(order: tuple[int, int, int]) -> None:
    """Releases of transformers before 5.23 returned them in four orders."""
    parts = (torch.randn(5, 8), torch.rand(5, 2), torch.randint(8, (5, 2)))
    found = parse_output(nn.Identity(), (), {}, tuple(parts[i] for i in order))
    assert found is not None
    assert all(a is b for a, b in zip(found.parts, parts, strict=True))


def test_what_is_no_router_is_passed_over() -> None:
    assert parse_output(nn.Identity(), (), {}, torch.randn(5, 8)) is None
    assert parse_output(nn.Identity(), (), {}, (torch.randn(5, 8), torch.randn(5, 2))) is None
    assert (
        parse_output(nn.Identity(), (), {}, (torch.randn(2, 5, 8), torch.randn(5, 2), torch.randint(8, (5, 2)))) is None
    )
