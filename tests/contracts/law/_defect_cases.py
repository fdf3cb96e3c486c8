"""What the ranks of test_defects_ranks.py do, with a router whose weight is the identity: its input is its logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from equipoise import AuxLoss, Balancer, ExpertBias, Ranks, Router
from equipoise.autograd.token_layout import TokenLayout
from equipoise.distributed import ALONE, Group


def logits_router(experts: int, top_k: int, **options: Any) -> Router:
    """Its input is its logits, and the gradient of its input is theirs."""
    router = Router(experts, experts, top_k, **options)
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts))
    return router


def push_of_a_part(logits_TE: Tensor, top_k: int, scope: str, multiply: float = 1.0, sharded: bool = False) -> Tensor:
    """The balance gradient at this rank's tokens, coefficient 1, for a loss that the engine multiplies."""
    part_TE = logits_TE.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    router = logits_router(logits_TE.shape[1], top_k)
    world = Group.world()
    balancer = Balancer(
        router, [AuxLoss(scope, coef=1.0, estimator="exact")], ranks=Ranks(world, world if sharded else ALONE)
    )
    loss = 0 * router(part_TE, TokenLayout(1)).weights_TK.sum()
    (balancer.tap(loss) * multiply).backward()
    assert part_TE.grad is not None
    return part_TE.grad


def sum_push_of_a_part(logits_TE: Tensor, top_k: int) -> Tensor:
    """As Hugging Face's Trainer: a token sum over the step's tokens, multiplied by world, which DDP divides again."""
    part_TE = logits_TE.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    router = logits_router(logits_TE.shape[1], top_k)
    balancer = Balancer(router, [AuxLoss("global_batch", coef=1.0, estimator="exact")], reduction="sum")
    balancer.begin_step(tokens=len(logits_TE))
    loss = 0 * router(part_TE, TokenLayout(1)).weights_TK.sum()
    (balancer.tap(loss) * dist.get_world_size()).backward()
    assert part_TE.grad is not None
    return part_TE.grad


def biases_after(steps_NTE: Tensor, rule: str, rate: float) -> tuple[Tensor, list[list[int]]]:
    """(bias, load of each step) where ranks see different tokens."""
    router = logits_router(steps_NTE.shape[2], 2, gate="sigmoid")
    balancer = Balancer(router, [ExpertBias(rule, rate)])
    optimizer, loads = torch.optim.SGD(router.parameters(), lr=0.0), []
    for logits_TE in steps_NTE:
        part_TE = logits_TE.chunk(dist.get_world_size())[dist.get_rank()]
        balancer.tap(router(part_TE, TokenLayout(1)).weights_TK.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        loads.append(balancer.load()[0].tolist())
    assert router.expert_bias is not None
    return router.expert_bias.clone(), loads


def routers_under_ddp(steps: int) -> dict[str, Tensor]:
    """Router weights after some steps, where each rank has every second sequence of each step."""
    from torch.nn.parallel import DistributedDataParallel

    from contracts.law._model import Micro, loss_of, make_step, net

    model = net(experts=(5, 6), top_k=(2, 1))
    wrapped = DistributedDataParallel(model)
    balancer = Balancer(model, [AuxLoss("global_batch", 0.3, estimator="prefix"), AuxLoss("sequence", 0.3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        (whole,) = make_step(step, 1, sequences=4)
        mine = slice(dist.get_rank(), None, dist.get_world_size())
        balancer.tap(loss_of(wrapped, Micro(whole.x_BSD[mine], whole.target_BSD[mine]))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters() if ".gate." in name}
