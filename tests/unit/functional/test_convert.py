"""Converted coefficients push as hard as the released function they come from, on the tokens of real text."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equipoise import ConfigError
from equipoise.functional import balance_loss, convert_coef, gate_probs, route
from unit.functional._released import released

COEF, EXPERTS = 1e-2, 8


def logits_of_text(layers: int = 1, tokens: int = 96) -> list[Tensor]:
    """A byte's embedding times a gate, for every byte of this file's beginning: uneven, as text is."""
    torch.manual_seed(layers)
    ids = torch.tensor(list(Path(__file__).read_bytes()[:tokens]))
    embedding, gate = nn.Embedding(256, 16), nn.Linear(16, EXPERTS)
    logits_TE = 0.5 * gate(embedding(ids)).detach()
    return [logits_TE.clone().requires_grad_() for _ in range(layers)]


def chosen(logits_TE: Tensor, top_k: int) -> Tensor:
    return torch.bincount(logits_TE.topk(top_k).indices.flatten(), minlength=EXPERTS)


def transformers(layers: list[Tensor], top_k: int) -> Tensor:
    qwen = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe", reason="transformers is optional")
    return qwen.load_balancing_loss_func(tuple(layers), EXPERTS, top_k)


def megatron(layers: list[Tensor], top_k: int) -> Tensor:
    loss = released("megatron/core/transformer/moe/moe_utils.py", "switch_load_balancing_loss_func")
    tokens = len(layers[0])
    return sum_of(loss(z.softmax(-1), chosen(z, top_k), tokens, top_k, EXPERTS, 1.0) for z in layers)


def olmo(layers: list[Tensor], top_k: int) -> Tensor:
    kinds = SimpleNamespace(instance="instance", local_batch="local_batch")
    names = {"get_local_tensor": lambda tensor: tensor, "MoELoadBalancingLossGranularity": kinds}
    loss = released("olmo_core/nn/moe/loss.py", "load_balancing_loss", **names)

    def one(z: Tensor) -> Tensor:
        counts_E = chosen(z, top_k)
        return loss(
            num_experts=EXPERTS,
            top_k=top_k,
            expert_scores=z.softmax(-1).unsqueeze(0),
            batch_size_per_expert=counts_E,
            batched_batch_size_per_expert=counts_E.unsqueeze(0),
            granularity=kinds.local_batch,
        )

    return sum_of(one(z) for z in layers)


def olmo_v1(layers: list[Tensor], top_k: int) -> Tensor:
    return olmo(layers, top_k) / len(layers)  # MoEBase divides its weight, scale_loss_by_num_layers


def automodel(layers: list[Tensor], top_k: int) -> Tensor:
    loss = released("nemo_automodel/components/moe/layers.py", "Gate._compute_aux_loss", DeviceMesh=None)
    gate, everyone = SimpleNamespace(n_experts=EXPERTS, topk=top_k), torch.ones(len(layers[0]), dtype=torch.bool)
    return sum_of(loss(gate, z.softmax(-1), chosen(z, top_k), everyone, None) for z in layers)


def deepspeed(layers: list[Tensor], top_k: int) -> Tensor:
    name, more = {1: ("top1gating", {"use_rts": False}), 2: ("top2gating", {"top2_2nd_expert_sampling": False})}.get(
        top_k, ("topkgating", {"k": top_k})
    )
    gating = released("deepspeed/moe/sharded_moe.py", name, USE_EINSUM=False)
    return sum_of(gating(z, capacity_factor=8.0, min_capacity=1, **more)[0] for z in layers)


def megablocks(layers: list[Tensor], top_k: int) -> Tensor:
    saved = [(chosen(z, top_k), z.softmax(-1)) for z in layers]
    loss = released("megablocks/layers/moe.py", "batched_load_balancing_loss", _LOAD_BALANCING_LOSS=saved)
    args: dict[str, Any] = {"moe_loss_weight": 1.0, "num_layers": len(layers), "moe_num_experts": EXPERTS}
    args |= {"pipeline_model_parallel_size": 1, "num_layers_per_virtual_pipeline_stage": None}
    return loss(SimpleNamespace(**args, moe_top_k=top_k, moe_lbl_in_fp32=True))


def sum_of(losses: Any) -> Tensor:
    return torch.stack(list(losses)).sum()


RELEASED = {
    "automodel": automodel,
    "deepspeed": deepspeed,
    "megablocks": megablocks,
    "megatron": megatron,
    "olmo-core": olmo_v1,
    "olmo-core-v2": olmo,
    "transformers": transformers,
}


SIZES = [(1, 1), (1, 2), (3, 1), (4, 3)]  # layers, K
# DeepSpeed's top-2 gate counts first choices only: it has tests of its own below
CASES = [(source, *size) for source in RELEASED for size in SIZES if (source, size[1]) != ("deepspeed", 2)]


@pytest.mark.parametrize(("source", "layers", "top_k"), CASES)
def test_the_released_formula(source, layers, top_k):
    """B11, B12: their gradient on layers that are loaded alike, against the sum of ours over layers."""
    theirs = logits_of_text(layers)
    (COEF * RELEASED[source](theirs, top_k)).backward()
    ours = theirs[0].detach().clone().requires_grad_()
    coef = convert_coef(COEF, source, top_k=top_k, num_layers=layers)
    (coef * balance_loss(gate_probs(ours), route(ours.detach(), top_k).expert_ids_TK)).backward()
    assert ours.grad is not None and ours.grad.abs().max() > 1e-7
    for logits_TE in theirs:
        torch.testing.assert_close(ours.grad, logits_TE.grad, rtol=1e-4, atol=1e-9)


def test_deepspeeds_top_2_counts_first_choices():
    """B16: equal to ours where second choices are spread as the first; on other text no coefficient makes it so."""
    (once,) = logits_of_text(1)
    first, second = once.detach().topk(2).indices.T
    swapped = once.detach().clone()
    rows = torch.arange(len(swapped))
    swapped[rows, first], swapped[rows, second] = once.detach()[rows, second], once.detach()[rows, first]
    for logits_TE, alike in ((torch.cat([once.detach(), swapped]), True), (once.detach(), False)):
        theirs, ours = logits_TE.clone().requires_grad_(), logits_TE.clone().requires_grad_()
        (COEF * deepspeed([theirs], 2)).backward()
        coef = convert_coef(COEF, "deepspeed", top_k=2)
        (coef * balance_loss(gate_probs(ours), route(ours.detach(), 2).expert_ids_TK)).backward()
        assert theirs.grad is not None and ours.grad is not None
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-9) is alike


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'transformers'"):
        convert_coef(1.0, "transformer")
    with pytest.raises(ConfigError, match="at least 1"):
        convert_coef(1.0, "megatron", top_k=0)
    for coef in (-1e-3, math.nan, math.inf):
        with pytest.raises(ConfigError, match="a coefficient >= 0"):
            convert_coef(coef, "megatron")


@pytest.mark.parametrize(
    ("source", "sizes"),
    [
        ("transformers", {}),
        ("transformers", {"top_k": 8}),
        ("maxtext", {"num_layers": 4}),
        ("megablocks", {"top_k": 8}),
    ],
)
def test_a_size_that_the_source_depends_on_has_no_default(source, sizes):
    with pytest.raises(ConfigError, match="which this source depends on"):
        convert_coef(1.0, source, **sizes)
    assert convert_coef(1.0, "megatron") == convert_coef(1.0, "megablocks", num_layers=1) == 1.0
