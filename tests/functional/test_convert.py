"""Converted coefficients push as hard as the released function they come from."""

from __future__ import annotations

import pytest
import torch

from equipoise import ConfigError
from equipoise.functional import balance_loss, convert_coef, gate_probs, route


@pytest.mark.parametrize(("layers", "top_k"), [(1, 1), (1, 2), (3, 2), (4, 3)])
def test_transformers(layers, top_k):
    """B11, B12: the released function on layers that are loaded alike, against the sum of ours over layers."""
    qwen = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    one = torch.randn(40, 6, generator=torch.Generator().manual_seed(layers))
    theirs = [one.clone().requires_grad_() for _ in range(layers)]
    (0.01 * qwen.load_balancing_loss_func(tuple(theirs), 6, top_k)).backward()
    ours = one.clone().requires_grad_()
    coef = convert_coef(0.01, "transformers", top_k=top_k, num_layers=layers)
    (coef * balance_loss(gate_probs(ours), route(ours.detach(), top_k).expert_ids_TK)).backward()
    for logits in theirs:
        torch.testing.assert_close(ours.grad, logits.grad, rtol=1e-4, atol=1e-9)


def test_a_mean_over_layers_is_one_layers_share():
    assert convert_coef(0.1, "megablocks", top_k=4, num_layers=5) == pytest.approx(0.02)
    assert convert_coef(0.1, "megatron", top_k=4, num_layers=5) == 0.1


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'transformers'"):
        convert_coef(1.0, "transformer")
    with pytest.raises(ConfigError, match="at least 1"):
        convert_coef(1.0, "megatron", top_k=0)
