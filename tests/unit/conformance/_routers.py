"""A router written for these tests, plain torch: right as it stands, and with one fault at a time."""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor

from equipoise.conformance import Adapter, Answer, Task


class Right(Adapter):
    """Global-batch loss from a first look at the whole step, and a bias by the sign of its load."""

    scope = "global_batch"
    masks = counts = layers = True
    bias_rate = 1e-3

    def step(self, task: Task) -> Answer:
        weights_LED = task.weights_LED.clone().requires_grad_()
        self.counts_LE = torch.zeros(weights_LED.shape[:2], dtype=torch.float64)
        with torch.no_grad():
            whole_LE = self.over_ranks(task, sum(self.count(task, weights_LED, *one) for one in task.micro_batches))
        fractions_LE = whole_LE / whole_LE.sum(dim=1, keepdim=True)
        for hidden_BSD, mask_BS in task.micro_batches:
            route = self.route(task, fractions_LE, mask_BS)
            (task.coef * task.world * self.share(task) * task.forward(route, hidden_BSD, weights_LED)).backward()
        return Answer(task.average(weights_LED.grad), whole_LE, self.bias(task, whole_LE))

    def route(self, task: Task, fractions_LE: Tensor, mask_BS: Tensor | None):
        def loss(hidden_BSD: Tensor, weights_LED: Tensor) -> Tensor:
            probs_LBSE = torch.einsum("bsd,led->lbse", hidden_BSD.float(), weights_LED.float()).softmax(dim=-1)
            if mask_BS is not None:
                probs_LBSE = probs_LBSE.where(mask_BS[..., None], 0)
            return task.num_experts * torch.einsum("lbse,le->", probs_LBSE, fractions_LE.float())

        return loss

    def share(self, task: Task) -> float:
        return 1 / task.tokens

    def count(self, task: Task, weights_LED: Tensor, hidden_BSD: Tensor, mask_BS: Tensor | None) -> Tensor:
        """(L, E)"""
        ids_LBSK = torch.einsum("bsd,led->lbse", hidden_BSD, weights_LED).topk(task.top_k).indices
        chosen_LBSE = torch.nn.functional.one_hot(ids_LBSK, task.num_experts).sum(dim=-2).double()
        if mask_BS is not None:
            chosen_LBSE = chosen_LBSE * mask_BS[..., None]
        return chosen_LBSE.sum(dim=(1, 2))

    def over_ranks(self, task: Task, counts_LE: Tensor) -> Tensor:
        return task.add(counts_LE)

    def bias(self, task: Task, counts_LE: Tensor) -> Tensor:
        return task.bias_rate * (counts_LE.mean(dim=1, keepdim=True) - counts_LE).sign()


class KTimes(Right):
    def share(self, task: Task) -> float:
        return task.top_k / task.tokens


class SummedOverMicroBatches(Right):
    def share(self, task: Task) -> float:
        return len(task.micro_batches) / task.tokens


class OwnRankOnly(Right):
    def over_ranks(self, task: Task, counts_LE: Tensor) -> Tensor:
        return counts_LE


class CountsPadding(Right):
    def count(self, task: Task, weights_LED: Tensor, hidden_BSD: Tensor, mask_BS: Tensor | None) -> Tensor:
        return super().count(task, weights_LED, hidden_BSD, None)


class Pooled(Right):
    def over_ranks(self, task: Task, counts_LE: Tensor) -> Tensor:
        return super().over_ranks(task, counts_LE).mean(dim=0, keepdim=True).expand_as(counts_LE)


class CountsInForward(Right):
    """Recompute runs forward again."""

    def route(self, task: Task, fractions_LE: Tensor, mask_BS: Tensor | None):
        inner = super().route(task, fractions_LE, mask_BS)

        def loss(hidden_BSD: Tensor, weights_LED: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                self.counts_LE += self.count(task, weights_LED.detach(), hidden_BSD.detach(), mask_BS)
            return inner(hidden_BSD, weights_LED)

        return loss

    def step(self, task: Task) -> Answer:
        gradient_LED, _, bias_LE = super().step(task)
        return Answer(gradient_LED, task.add(self.counts_LE), bias_LE)


class CountsEvaluation(Right):
    """A module that counts whatever it is shown."""

    def route(self, task: Task, fractions_LE: Tensor, mask_BS: Tensor | None):
        inner, adapter = super().route(task, fractions_LE, mask_BS), self

        class Counting(torch.nn.Module):
            def forward(self, hidden_BSD: Tensor, weights_LED: Tensor) -> Tensor:
                adapter.counts_LE += adapter.count(task, weights_LED.detach(), hidden_BSD.detach(), mask_BS)
                return inner(hidden_BSD, weights_LED)

        return Counting()

    def step(self, task: Task) -> Answer:
        gradient_LED, _, bias_LE = super().step(task)
        return Answer(gradient_LED, task.add(self.counts_LE), bias_LE)


class CountsInBfloat16(Right):
    def over_ranks(self, task: Task, counts_LE: Tensor) -> Tensor:
        return task.add(counts_LE.bfloat16())


class Frozen(Right):
    def bias(self, task: Task, counts_LE: Tensor) -> Tensor:
        return torch.zeros_like(counts_LE)


class BiasOfOwnRank(Right):
    def bias(self, task: Task, counts_LE: Tensor) -> Tensor:
        return super().bias(task, counts_LE) * (task.rank + 1)


class Detached(Right):
    def share(self, task: Task) -> float:
        return 0.0


class OneRankRaises(Right):
    def step(self, task: Task) -> Answer:
        if task.rank == 1:
            raise RuntimeError("the second rank is out of memory")
        return super().step(task)


class Dies(Right):
    def step(self, task: Task) -> Answer:
        if task.top_k == 1:
            os._exit(7)
        return super().step(task)


class Hangs(Right):
    def step(self, task: Task) -> Answer:
        if task.rank == 1:
            time.sleep(3600)
        return super().step(task)
