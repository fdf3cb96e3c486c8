"""What runs in each rank for test_faults.py: one rank fails a guard, and no rank may hang."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist

from contracts.law._model import BIAS, loss_of, make_step, net
from contracts.law.test_faults import detached, documents, documents_out_of_range, nan_logits, without_a_forward
from equipoise import AuxLoss, Balancer, EquipoiseError, devices

BAD = {
    "nan": nan_logits,
    "documents": documents_out_of_range,
    "detached": detached,
    "no forward": without_a_forward,
}
FAILING, AT = 2, 2  # the rank, the step


def one_fails(guard: str, where: str, on_fault: str) -> tuple[str, list[float]]:
    """(what this rank was told, the bias then or at the end) where rank 2 fails a guard in step 2.

    Only the balancer communicates: gradients are not averaged, and with a learning rate of 0 need not be.
    """
    held, devices.HOST_READABLE = devices.HOST_READABLE, {"cpu"} if where == "at hand" else set()
    try:
        return _one_fails(guard, on_fault)
    finally:
        devices.HOST_READABLE = held


def _one_fails(guard: str, on_fault: str) -> tuple[str, list[float]]:
    model: Any = net(experts=(5,), top_k=(2,), gate="sigmoid")
    scope = "document" if guard == "documents" else "global_batch"
    balancer = Balancer(model, [AuxLoss(scope, 0.3, estimator="previous"), BIAS], on_fault=on_fault)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    told: list[str] = []
    for step in range(AT + 3):
        bad = dist.get_rank() == FAILING and step == AT
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            try:
                _step(model, balancer, optimizer, guard if bad else "", step)
            except EquipoiseError as error:
                return str(error), model.blocks[0].gate.expert_bias.tolist()
        told += [str(one.message) for one in seen if "left unbalanced" in str(one.message)]
    return "".join(told), model.blocks[0].gate.expert_bias.tolist()


def _step(model: Any, balancer: Balancer, optimizer: torch.optim.Optimizer, guard: str, step: int) -> None:
    micro = documents(make_step(10 * step + dist.get_rank())[0])
    if guard == "declared":
        balancer.begin_step(micro_batches=2)
    loss = BAD[guard](model, micro) if guard in BAD else loss_of(model, micro)
    (loss if guard == "no tap" else balancer.tap(loss)).backward()
    if guard == "discarded":
        balancer.discard()
    if guard == "unseen":
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1e-3)
    else:
        optimizer.step()
    if guard != "unseen":
        optimizer.zero_grad(set_to_none=False)


def all_empty() -> tuple[int, int]:
    """(steps committed, whether the bias moved only with them): an optimizer steps for another loss on all ranks."""
    model = net(experts=(5,), top_k=(2,), gate="sigmoid")
    balancer = Balancer(model, [AuxLoss("global_batch", 0.3), BIAS])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    stayed = 0
    for step in range(3):
        if step == 1:
            before = model.blocks[0].gate.expert_bias.clone()
            model.inp.weight.square().sum().backward()
            optimizer.step()
            stayed = int(torch.equal(before, model.blocks[0].gate.expert_bias))
        else:
            balancer.tap(loss_of(model, make_step(step)[0])).backward()
            optimizer.step()
        optimizer.zero_grad()
    return balancer.step_count, stayed
