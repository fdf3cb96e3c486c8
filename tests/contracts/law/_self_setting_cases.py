"""What runs in each rank for test_self_setting.py: one global batch, cut over ranks and micro-batches."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from contracts.law._model import cut, loss_of, make_step, net
from equipoise import AuxLoss, Balancer

DOUBLE: dict[str, Any] = {"dtype": torch.float64}


def coefficients(rule: Any, micro_batches: int, steps: int = 3) -> list[list[float]]:
    """After each step those of both layers; 8 sequences a step, of which each rank has its part."""
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    model = net(experts=(5, 6), top_k=(2, 2), **DOUBLE)
    balancer = Balancer(model, [AuxLoss("global_batch", rule, estimator="exact")])
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.05), []
    for number in range(steps):
        own = cut(make_step(number, 1, 8, **DOUBLE), size)[rank]
        parts = cut([own], micro_batches)
        with balancer.counting():
            for micro in parts:
                model(micro.x_BSD)
        for micro in parts:
            (balancer.tap(loss_of(model, micro)) / micro_batches).backward()
        for parameter in model.parameters():
            if size > 1:
                dist.all_reduce(parameter.grad)
                parameter.grad /= size
        optimizer.step()
        optimizer.zero_grad()
        metrics = balancer.metrics()
        found.append([metrics[f"balance/layer_{i:02d}/global/coef"] for i in range(2)])
    return found
