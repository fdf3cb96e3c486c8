"""A model that DDP or the compiler has wrapped is balanced like the one inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the hf extra is not installed")

from core._model import assert_close
from equipoise import AuxLoss, Balancer
from hf._trainer import STEP_POLICIES, Text, ddp_step, model

pytestmark = [
    pytest.mark.xdist_group("ranks"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # dynamo's own, of autograd functions
]


def batch(rows: range) -> dict[str, torch.Tensor]:
    text = [Text()[i] for i in rows]
    return {key: torch.stack([row[key] for row in text]) for key in text[0]}


def gradients(net: Any, wrapped: Any) -> dict[str, torch.Tensor]:
    balancer = Balancer(wrapped, [AuxLoss(**p) for p in STEP_POLICIES])
    wrapped.train()
    balancer.tap(wrapped(**batch(range(4))).logits.square().mean()).backward()
    return {n: p.grad.clone() for n, p in net.named_parameters()}


def test_a_compiled_model():
    net, plain = model(), model()
    assert_close(gradients(net, torch.compile(net, backend="eager")), gradients(plain, plain), 1e-5)


def test_two_ranks_of_ddp(ranks):
    """Each rank has half of the sequences; the gradient is that of all of them in one process."""
    net = model()
    balancer = Balancer(net, [AuxLoss(**p) for p in STEP_POLICIES])
    net.train()
    tokens = int(batch(range(8))["attention_mask"].sum())
    balancer.begin_step(tokens=tokens, micro_batches=1)
    balancer.tap(net(**batch(range(8))).logits.square().mean()).backward()
    expected = {n: p.grad.clone() for n, p in net.named_parameters()}
    for got in ranks.run(f"{ddp_step.__module__}:{ddp_step.__name__}", 8, tokens, size=2):
        assert_close(got, expected, 1e-5)
