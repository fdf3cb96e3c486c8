"""Megatron-core cut over ranks, against one process that sees the whole global batch in one graph, in float64.

The one process knows neither Megatron's schedule nor its data parallelism nor equipoise: its model, plain autograd, the law.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from engines._law import COEF
from engines.megatron._train import GLOBAL, LOSS_FREE, MICRO, SCOPES, THEIR_BIAS, THEIR_LOSS, train

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]  # its imports warn of torch's

RECORD = "record_parallel.py"
TOKENS, TOP_K, LAYERS = 32, 2, 2  # of a micro-batch, whatever it is cut into
LAW: dict[str, dict[str, Any]] = {
    **{one: {"policies": [{"kind": "AuxLoss", "scope": one, "coef": COEF}], "accumulation": 2} for one in SCOPES},
    "two losses": {"policies": [*GLOBAL, *MICRO], "accumulation": 3},
    "sum and tokens": {"policies": GLOBAL, "accumulation": 2, "loss": "sum"},
    "per token": {"policies": GLOBAL, "accumulation": 2, "loss": "per token"},
    "full recompute": {"policies": GLOBAL, "accumulation": 2, "recompute": "full"},
    "recompute of the MoE layer": {"policies": GLOBAL, "accumulation": 2, "recompute": "moe"},
    "padding": {"policies": MICRO, "accumulation": 2, "padding": 5},
    "bias": {"policies": [*LOSS_FREE, *GLOBAL], "accumulation": 2, "config": THEIR_BIAS},
}
FEW = ("global_batch", "sequence", "bias")


class Cut(NamedTuple):
    """How ranks share a model and a batch."""

    parallel: dict[str, int]
    ranks: int
    replicas: int = 1
    cases: tuple[str, ...] = tuple(LAW)


CUTS = {
    "tensor": Cut({"tensor": 2}, 2),
    "tensor, experts": Cut({"tensor": 2, "expert": 2, "expert tensor": 1}, 2, cases=FEW),
    "tensor, data": Cut({"tensor": 2}, 4, replicas=2, cases=FEW),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The one process, for so many data ranks."""
    known: dict[int, dict[str, Any]] = {}

    def of(replicas: int) -> dict[str, Any]:
        if replicas not in known:
            cases = {name: {key: value for key, value in case.items() if key not in ("policies", "recompute", "loss")}
                     | {"law": [one for one in case["policies"] if "scope" in one], "replicas": replicas}
                     for name, case in LAW.items()}  # fmt: skip
            (known[replicas],) = train(tmp_path_factory.mktemp("whole"), cases, record=RECORD)
        return known[replicas]

    return of


@pytest.fixture(scope="module")
def parts(request, tmp_path_factory):
    """(how it was cut, what each rank saw)."""
    cut = CUTS[request.param]
    cases = {name: LAW[name] | {"parallel": cut.parallel} for name in cut.cases}
    both = {"accumulation": 2, "steps": 2, "config": THEIR_BIAS | THEIR_LOSS, "parallel": cut.parallel}
    cases |= {"plain": both, "look": {**both, "policies": []}}
    return cut, train(tmp_path_factory.mktemp("cut"), cases, cut.ranks, RECORD)


@pytest.mark.parametrize(
    ("parts", "name"), [(key, name) for key, cut in CUTS.items() for name in cut.cases], indirect=["parts"]
)
def test_every_gradient_and_load_is_that_of_one_process(parts, whole, name):
    cut, of_ranks = parts
    right = whole(cut.replicas)[name]
    for of_rank in of_ranks:
        got, off, size = of_rank[name], {"": 0.0, "router.weight": 0.0}, {"": 0.0, "router.weight": 0.0}
        for key, gradient in got["gradients"].items():
            known, (dim, part, number) = got["places"][key]
            expected = right["gradients"][known].chunk(number, dim)[part]
            for end in off:
                if key.endswith(end):
                    off[end] += float((gradient - expected).square().sum())
                    size[end] += float(expected.square().sum())
        for end in off:
            assert 0 < size[end] and off[end] ** 0.5 < 1e-12 * size[end] ** 0.5
        assert all(torch.equal(a, b) for a, b in zip(got["load"], right["load"].long(), strict=True))
        tokens = (TOKENS - LAW[name].get("padding", 0)) * LAW[name]["accumulation"] * cut.replicas
        assert got["metrics"]["balance/tokens"] == tokens
        assert [int(counts_E.sum()) for counts_E in got["load"]] == [tokens * TOP_K] * LAYERS


@pytest.mark.parametrize("parts", CUTS, indirect=True)
def test_the_bias_moves_once_by_the_load_of_all_ranks(parts):
    for of_rank in parts[1]:
        for counts_E, bias_E in zip(of_rank["bias"]["load"], of_rank["bias"]["bias"], strict=True):
            moved_E = 1e-3 * (counts_E.double().mean() - counts_E).sign()
            torch.testing.assert_close(bias_E.double(), moved_E - moved_E.mean(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("parts", CUTS, indirect=True)
def test_looking_changes_no_bit(parts):
    for of_rank in parts[1]:
        plain, look = of_rank["plain"], of_rank["look"]
        assert all(torch.equal(plain["weights"][k], look["weights"][k]) for k in plain["weights"])
        assert all(torch.equal(a, b) and bool(a.any()) for a, b in zip(plain["bias"], look["bias"], strict=True))
