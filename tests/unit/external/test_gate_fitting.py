"""The gate, normalization, scale and temperature of weights are found from logits and weights alone."""

from __future__ import annotations

import pytest
import torch

from equipoise.external.gate_fitting import (
    CLOSE,
    are_probabilities,
    as_logits,
    fit_gate,
    fit_temperature,
    gate_weights,
    log_probabilities,
    relative_difference,
)
from equipoise.external.output_formats import RouterOutput
from equipoise.functional import GATES

LOGITS = 2 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
IDS = LOGITS.topk(3).indices


def naive_weights(gate: str, normalize: bool, scale: float) -> torch.Tensor:
    z = LOGITS.double()
    scores = {"softmax": z.softmax(-1), "sigmoid": 1 / (1 + (-z).exp()), "sqrt_softplus": (1 + z.exp()).log().sqrt()}
    chosen = scores[gate].gather(-1, IDS)
    return (scale * (chosen / chosen.sum(-1, keepdim=True) if normalize else chosen)).float()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("normalize", "scale"), [(True, 1.0), (True, 2.5), (False, 1.0), (False, 0.3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_weights_were_made_with_is_found(gate: str, normalize: bool, scale: float, dtype: torch.dtype) -> None:
    fit = fit_gate(RouterOutput(LOGITS, naive_weights(gate, normalize, scale).to(dtype), IDS))
    assert (fit.gate, fit.normalize) == (gate, normalize)
    assert fit.scale == pytest.approx(scale, rel=0.01) and fit.distance <= CLOSE
    made = fit.scale * gate_weights(LOGITS, IDS, gate, normalize)
    assert relative_difference(made, naive_weights(gate, normalize, scale)) < CLOSE


def test_dropped_choices_do_not_hide_the_gate() -> None:
    weights, ids = naive_weights("sigmoid", True, 1.0), IDS.clone()
    ids[::3, 2] = -1  # their weights were in the sum of the others
    fit = fit_gate(RouterOutput(LOGITS, weights, ids))
    assert (fit.gate, fit.normalize) == ("sigmoid", True)
    assert (gate_weights(LOGITS, ids, "sigmoid", True)[::3, 2] == 0).all()


def test_weights_of_no_gate_fit_none() -> None:
    factor = torch.rand(8, generator=torch.Generator().manual_seed(1)) + 0.5
    output = RouterOutput(LOGITS, naive_weights("softmax", True, 1.0) * factor[IDS], IDS)
    assert fit_gate(output).distance > CLOSE
    assert fit_temperature(output) is None


def test_a_temperature_is_found() -> None:
    weights = (LOGITS / 0.7).softmax(-1).gather(-1, IDS)
    assert fit_temperature(RouterOutput(LOGITS, weights, IDS)) == pytest.approx(0.7, rel=1e-3)


def test_probabilities_are_told_from_logits() -> None:
    probs = LOGITS.softmax(-1)
    assert are_probabilities(probs) and are_probabilities(probs.bfloat16()) and not are_probabilities(LOGITS)
    assert not are_probabilities(LOGITS.sigmoid())
    assert torch.allclose(as_logits(probs).softmax(-1), probs) and torch.equal(as_logits(LOGITS), LOGITS)
    assert log_probabilities(torch.tensor([[0.0, 1.0]])).isfinite().all()
