"""Our balance gradient at given logits: a router whose weight is the identity, with nothing else in the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from equipoise import AuxLoss, Balancer
from equipoise.autograd.token_layout import TokenLayout
from equipoise.layers import Router


def our_gradients(
    micro_batches: list[Tensor], top_k: int, scope: Any, *, masks: list[Tensor] | None = None, sequences: int = 1
) -> tuple[list[Tensor], Balancer]:
    """Gradients at the logits of each micro-batch, before any engine averages over ranks; coefficient 1, exact f."""
    experts = micro_batches[0].shape[-1]
    router = Router(experts, experts, top_k)
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts))
    balancer = Balancer(router, [AuxLoss(scope, coef=1.0, estimator="exact")])
    given = [z.detach().float().requires_grad_() for z in micro_batches]
    batches = [TokenLayout(sequences, None if masks is None else masks[m]) for m in range(len(given))]
    if len(given) > 1:
        with balancer.counting():
            for z, batch in zip(given, batches, strict=True):
                router(z, batch)
    if masks is not None:
        valid = sum(float(mask.sum()) for mask in masks)
        balancer.begin_step(tokens=valid, micro_batches=len(given))
    for z, batch in zip(given, batches, strict=True):
        loss = 0 * router(z, batch).weights_TK.sum()
        (balancer.tap(loss) / len(given)).backward()
    torch.optim.SGD(router.parameters(), lr=0.0).step()
    return [z.grad for z in given], balancer  # type: ignore[misc]
