"""What runs in each rank for test_quantile_elsewhere.py: the same logits, cut over ranks in two ways."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from contracts.law._defect_cases import logits_router
from equipoise import Balancer, ExpertBias
from equipoise.autograd.token_layout import TokenLayout
from equipoise.distributed import Group, Ranks


def bias_after(steps_NTE: Tensor, mask_NT: Tensor, sharded: bool) -> tuple[list[float], list[list[int]]]:
    """(bias, loads) where each rank has its part of the tokens: sequences of its own, or a shard of one sequence."""
    world = Group.world()
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    router = logits_router(steps_NTE.shape[2], 2, gate="sigmoid")
    balancer = Balancer(router, [ExpertBias("quantile")], ranks=Ranks(world, world if sharded else Group()))
    optimizer, loads = torch.optim.SGD(router.parameters(), lr=0.0), []
    for logits_TE, mask_T in zip(steps_NTE, mask_NT, strict=True):
        layout = TokenLayout(1, mask_T.chunk(size)[rank])
        balancer.tap(router(logits_TE.chunk(size)[rank], layout).weights_TK.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        loads.append(balancer.load()[0].tolist())
    assert router.expert_bias is not None
    return router.expert_bias.tolist(), loads
