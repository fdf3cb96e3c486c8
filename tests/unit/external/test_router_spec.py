"""The specification fitted to a router: also of one whose logits are nearly equal, and what it cannot tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contracts.law._external import D, E, Gate
from equipoise import ConfigError
from equipoise.external.example_run import RouterCall
from equipoise.external.output_formats import parse_output, part_expressions
from equipoise.external.router_spec import fit_spec, fit_spec_to_observe
from equipoise.functional import GATES

X = torch.randn(32, D, generator=torch.Generator().manual_seed(0))


def call_of(router: nn.Module) -> RouterCall:
    output = router(X)
    parsed = parse_output(router, (X,), {}, output)
    assert parsed is not None
    return RouterCall(parsed.parts, (X,), {}, part_expressions(output), parsed.ambiguous)


def router(kind: str = "plain", gate: str = "softmax", std: float = 1.0, **options: Any) -> Gate:
    torch.manual_seed(0)
    made = Gate(kind, gate, **options).eval()
    nn.init.normal_(made.linear.weight, std=std)
    return made


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("std", [1e-3, 1.0])
def test_the_gate_is_found_also_from_logits_that_are_nearly_equal(gate: str, std: float) -> None:
    made = router(gate=gate, std=std)
    weight = made.linear.weight.clone()
    spec = fit_spec(made, "gate", call_of(made))
    assert (spec.num_experts, spec.top_k, spec.gate, spec.normalize) == (E, 2, gate, True)
    assert spec.exact and spec.gate_fits and not spec.swapped and not spec.probabilities
    assert spec.scale == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(made.linear.weight, weight)


class Dense(Gate):
    first = True

    def output(self, z: Tensor, weights: Tensor, ids: Tensor) -> Any:
        return (z, weights, ids) if self.first else (weights, z, ids)


@pytest.mark.parametrize("first", [True, False])
def test_with_k_equal_to_e_the_order_is_what_follows_from_what(first: bool) -> None:
    made = Dense(k=E).eval()
    made.first = first
    assert fit_spec(made, "gate", call_of(made)).swapped == (not first)


class TwoWays(nn.Module):
    """With K = E, both are softmax probabilities: either could be made of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, 2, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p = self.linear(x).softmax(dim=-1)
        return (p, *p.sort(dim=-1, descending=True))


def test_what_cannot_be_told_apart_is_refused_and_may_be_observed() -> None:
    made = TwoWays()
    with pytest.raises(ConfigError, match="each of the two follows from the other") as caught:
        fit_spec(made, "gate", call_of(made))
    assert "(output[0], output[1], output[2])" in caught.value.do
    assert not fit_spec_to_observe(made, "gate", call_of(made)).gate_fits


def test_dropped_choices_and_groups_leave_no_room_for_a_bias() -> None:
    dropping = router("dynamic k")
    spec = fit_spec(dropping, "gate", call_of(dropping))
    assert spec.may_drop and not spec.exact
    grouped = router("groups")
    assert "leaves out experts" in fit_spec(grouped, "gate", call_of(grouped)).no_bias


def test_a_class_whose_weights_are_more_than_scores_has_its_gate_from_the_table() -> None:
    phimoe = type("PhimoeTopKRouter", (Gate,), {})().eval()
    spec = fit_spec(phimoe, "gate", call_of(phimoe))
    assert (spec.gate, spec.exact) == ("softmax", False) and "more than scores" in spec.no_bias
