"""What runs in each rank for test_what_is_a_step.py."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from contracts.law._model import BIAS, Micro, loss_of, make_step, net
from equipoise import AuxLoss, Balancer


def zero_1(named: str) -> tuple[list[list[list[int]]], Tensor, int]:
    """(loads of three steps, the first router's bias, steps seen), each rank with every second sequence."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when it is imported

    model = net(experts=(5, 6), top_k=(2, 2), gate="sigmoid")
    wrapped = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(wrapped.parameters(), torch.optim.SGD, lr=0.05)
    chosen = {"outer": optimizer, "inner": optimizer.optim}.get(named)
    balancer = Balancer(wrapped, [AuxLoss("global_batch", 0.3), BIAS], chosen)
    loads = []
    for seed in range(3):
        (whole,) = make_step(seed, 1, sequences=4)
        mine = slice(dist.get_rank(), None, dist.get_world_size())
        optimizer.zero_grad()
        balancer.tap(loss_of(wrapped, Micro(whole.x_BSD[mine], whole.target_BSD[mine]))).backward()
        optimizer.step()
        loads.append([counts_E.tolist() for counts_E in balancer.load()])
    return loads, model.blocks[0].gate.expert_bias.clone(), balancer.step_count


def fsdp1(use_orig_params: bool) -> tuple[Tensor, list[list[int]], int]:
    """(gate weight after two steps, loads of the last, steps): FSDP1 shards one flat parameter, or keeps the names."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    rank = dist.get_rank()
    wrapped = FullyShardedDataParallel(
        net(experts=(5,), top_k=(2,)), use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    balancer = Balancer(wrapped, [AuxLoss("micro_batch", 0.5)])
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for seed in range(2):
        balancer.tap(loss_of(wrapped, make_step(10 * seed + rank)[0])).backward()
        optimizer.step()
        optimizer.zero_grad()
    with FullyShardedDataParallel.summon_full_params(wrapped):
        weight = wrapped.module.blocks[0].gate.weight.detach().clone()
    return weight, [counts_E.tolist() for counts_E in balancer.load()], balancer.step_count
