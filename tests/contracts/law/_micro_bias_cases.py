"""What runs in each rank for test_micro_batch_bias.py: uneven micro-batches, and what routers chose in each."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from contracts.law._model import Micro, loss_of, make_step, net
from equipoise import AuxLoss, Balancer, ExpertBias

RATE = 0.02


def uneven(rank: int, seed: int) -> list[Micro]:
    """Three micro-batches: other numbers of sequences on each rank, padding, and one of nothing but padding."""
    found = []
    for m, sequences in enumerate([(2, 1, 3), (1, 4, 2)][rank]):
        (micro,) = make_step(10 * seed + 3 * rank + m, sequences=sequences, length=4 + m, masked=True)
        assert micro.mask_BS is not None
        empty = (rank, m) == (1, 2)
        found.append(micro._replace(mask_BS=torch.zeros_like(micro.mask_BS) if empty else micro.mask_BS))
    return found


def counts_of(routing: Any, mask_T: Tensor | None) -> list[int]:
    """By a loop over tokens."""
    counts = [0] * routing.logits_TE.shape[1]
    for t, chosen in enumerate(routing.expert_ids_TK.tolist()):
        if mask_T is None or bool(mask_T[t]):
            for expert in chosen:
                counts[expert] += 1
    return counts


def trained(rule: str, steps: int = 2) -> list[dict[str, list]]:
    """For each step: of each layer the counts of this rank's micro-batches, and the bias after the step."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    model = net(experts=(5, 6), top_k=(2, 2), gate="sigmoid")
    balancer = Balancer(model, [ExpertBias(rule, RATE, scope="micro_batch"), AuxLoss("global_batch", 0.3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    seen: list[list[list[int]]] = [[], []]
    for layer, block in enumerate(model.blocks):
        block.gate.register_forward_hook(
            lambda _module, args, routing, layer=layer: seen[layer].append(counts_of(routing, args[1].token_mask_T))
        )
    found = []
    for number in range(steps):
        for micro in uneven(rank, number):
            (balancer.tap(loss_of(model, micro)) / 3).backward()
        for parameter in model.parameters():
            if dist.is_initialized():
                dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        found.append(
            {"counts": [list(one) for one in seen], "bias": [b.gate.expert_bias.tolist() for b in model.blocks]}
        )
        for one in seen:
            one.clear()
    return found
