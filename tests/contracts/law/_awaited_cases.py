"""What runs in each rank for test_awaited_sums.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from contracts.law._model import aux, make_step, net, policy
from equipoise import Balancer, Ranks
from equipoise.distributed import Group


class Noted(Group):
    """All ranks, with a diary of when each sum begins and is waited for; one takes at least ``seconds``."""

    def __init__(self, diary: list[str], seconds: float) -> None:
        super().__init__(dist.group.WORLD)
        self.diary, self.seconds, self.waited = diary, seconds, 0.0

    def start_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        self.diary.append("begins")
        done, wait = time.monotonic() + self.seconds, super().start_sum(tensor)

        def until_done() -> Tensor:
            self.diary.append("waits")
            began = time.monotonic()
            time.sleep(max(0.0, done - began))
            self.waited += time.monotonic() - began
            return wait()

        return until_done


class Head(torch.autograd.Function):
    """What lies between the loss and the last router: its backward takes a while."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, diary: list[str], seconds: float) -> Tensor:
        ctx.diary, ctx.seconds = diary, seconds
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.diary.append("head")
        time.sleep(ctx.seconds)
        return grads[0], None, None


def steps(
    mode: str, scope: str, estimator: str, at_once: bool = False, seconds: float = 0.0, measure: bool = False
) -> Any:
    """(diary of each backward, seconds waited, gradients of the last step) of two steps of four micro-batches a rank.

    ``at_once``: the tap itself waits, as it does where a router is compiled.
    """
    torch.compiler.reset()
    diary: list[str] = []
    diaries, gradients = [], {}
    model = net(mode="plain" if mode == "compiled" else mode, dtype=torch.float64)
    run = torch.compile(model, backend="aot_eager") if mode == "compiled" else model
    group = Noted(diary, seconds)
    balancer = Balancer(
        model, [policy(aux(scope, estimator=estimator))], ranks=Ranks(group), measure_estimators=measure
    )
    if at_once:
        balancer._awaited.put = lambda todo: todo()  # type: ignore[method-assign]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in range(2):
        for micro in make_step(number, micro_batches=8, dtype=torch.float64)[4 * group.rank : 4 * group.rank + 4]:
            y_BSD = Head.apply(run(micro.x_BSD), diary, seconds)
            diary.clear()
            (balancer.tap((y_BSD - micro.target_BSD).square().mean()) / 4).backward()
            diaries.append(list(diary))
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= group.size
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        waited = group.waited
        optimizer.step()
        optimizer.zero_grad()
        group.waited = 0.0  # for the sum of the step
    balancer.metrics()
    return diaries, waited, gradients
