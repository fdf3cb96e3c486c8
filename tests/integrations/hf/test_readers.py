"""The literal table of special routers, line by line, and what the reader makes of tuples in other orders."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from equipoise.external.output_formats import FORMATS, parse_output
from integrations.hf._cases import quiet
from integrations.hf.families import FAMILIES, build


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_special_class_exists_in_the_installed_version(name: str) -> None:
    """A line for a class that was renamed would protect nobody."""
    folders = {family.folder for family in FAMILIES.values()}
    modules = [importlib.import_module(f"transformers.models.{f}.modeling_{f}") for f in sorted(folders)]
    assert any(hasattr(module, name) for module in modules)


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


def test_llama4_scores_are_taken_apart_as_the_model_chose() -> None:
    with quiet():
        model = build("llama4")
    router = model.get_submodule("model.layers.0.feed_forward.router")
    scores_TE, logits_TE = router(torch.randn(7, 32))
    parsed = parse_output(router, (), {}, (scores_TE, logits_TE))
    assert parsed is not None
    found = parsed.parts
    for t in range(7):
        assert set(found.ids_TK[t].tolist()) == set(scores_TE[t].nonzero().view(-1).tolist())
        assert torch.equal(found.weights_TK[t], scores_TE[t][found.ids_TK[t]])
