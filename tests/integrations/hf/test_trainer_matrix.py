"""Eight families through the real Trainer, however a step is cut: gradients, loads and biases of the reference."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers", reason="the hf extra is not installed")
pytest.importorskip("accelerate", reason="the hf extra is not installed")

from _rounding import OURS
from integrations.hf._cases import USUAL
from integrations.hf._trainer import train, train_rank
from integrations.hf._trainer_reference import check, expected, policies_for

pytestmark = [
    pytest.mark.xdist_group("ranks"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def recompute(reentrant: bool) -> dict[str, Any]:
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}


# name -> (ranks, batch of a rank, accumulation, arguments): always the same 8 rows a step
CUTS: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "whole": (1, 8, 1, {}),
    "accumulated": (1, 2, 4, {}),
    "recompute": (1, 2, 4, recompute(False)),
    "reentrant": (1, 2, 4, recompute(True)),
    "ddp": (2, 2, 2, {}),
    "ddp-recompute": (2, 1, 4, recompute(False)),
    "fsdp2": (2, 2, 2, {"sharded": True}),
    "fsdp2-recompute": (2, 4, 1, {"sharded": True} | recompute(False)),
}
ALONE, TOGETHER = [c for c in CUTS if CUTS[c][0] == 1], [c for c in CUTS if CUTS[c][0] == 2]
# every family meets one cut of each kind, every cut two families; all pairs behind `full`
OFTEN = [(f, ALONE[i % 4]) for i, f in enumerate(USUAL)] + [
    (f, TOGETHER[(i + i // 4) % 4]) for i, f in enumerate(USUAL)
]
ALL = [
    pytest.param(f, c, id=f"{f}-{c}", marks=[] if (f, c) in OFTEN else [pytest.mark.full]) for f in USUAL for c in CUTS
]
# in float64 the cuts without recompute (see Float64): every family one of them, the others behind `full`
WIDE = ["whole", "accumulated", "ddp", "fsdp2"]
ALL_WIDE = [
    pytest.param(f, c, id=f"{f}-{c}", marks=[] if i % 4 == k else [pytest.mark.full])
    for i, f in enumerate(USUAL)
    for k, c in enumerate(WIDE)
]


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize(("family", "cut"), ALL)
def test_every_cut_of_a_step_is_the_reference(ranks, references, family, cut):
    """B09: the balance gradient is coef · E · f / T, T the router's tokens of the step, and not the label tokens."""
    every_cut_is(ranks, references, family, cut)


@pytest.mark.parametrize(("family", "cut"), ALL_WIDE)
def test_every_cut_of_a_step_is_the_reference_in_float64(ranks, references, family, cut):
    """In fp32 a family's own rounding is the bound; here the law and T have to be right to nine digits."""
    every_cut_is(ranks, references, family, cut, float64=True)


def every_cut_is(ranks: Any, references: dict[str, Any], family: str, cut: str, **more: Any) -> None:
    size, batch, accumulate, arguments = CUTS[cut]
    if family not in references:
        references[family] = expected(family)
    want, policies = references[family], policies_for(family)
    given = arguments | more | {"family": family, "learning_rate": 0.0, "optim": "sgd"}
    if size == 1:
        runs = [train(policies, batch, accumulate, 2, **given)]
    else:
        call = f"{train_rank.__module__}:{train_rank.__name__}"
        runs = ranks.run(call, policies, batch, accumulate, 2, given, size=size, timeout=120)
    for got in runs:
        assert got["sharded"] == ("fsdp2" in cut)
        check(got, want, OURS if more else None)


def test_the_reference_feels_the_law():
    """A comparison that passes without the balance loss would prove nothing: it is a large part of the gradient."""
    from integrations.hf import _trainer_reference as reference

    whole, coef = expected("qwen3_moe"), reference.COEF
    try:
        reference.COEF = 1e-12
        without = expected("qwen3_moe")
    finally:
        reference.COEF = coef
    name = "model.layers.0.mlp.gate.weight"
    for one, other in zip(whole.gradients, without.gradients, strict=True):
        assert (one[name] - other[name]).norm() > 0.1 * one[name].norm()
