"""equipoise under its own test: every scope, with the estimator that promises not to depend on the cut."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ..autograd.token_layout import TokenLayout
from ..balancer import Balancer
from ..functional.routing import Routing
from ..layers import Router
from ..policies import AuxLoss, ExpertBias
from .task import Adapter, Answer, Task

__all__ = ["GlobalBatch", "LossFree", "MicroBatch", "Sequence"]

WEIGHTS = Routing._fields.index("weights_TK")  # a reentrant checkpoint makes a plain tuple of it


class GlobalBatch(Adapter):
    """`AuxLoss("global_batch", estimator="exact")` on our `Router`."""

    name = "equipoise, global_batch"
    scope: ClassVar[Any] = "global_batch"
    masks = counts = layers = True

    def step(self, task: Task) -> Answer:
        layers, experts, width = task.weights_LED.shape
        form = {"gate": self.gate, "selection_bias": task.bias_rate > 0}
        model = torch.nn.ModuleList(Router(width, experts, task.top_k, **form) for _ in range(layers))
        routers = [router for router in model if isinstance(router, Router)]
        for router, weight_ED in zip(routers, task.weights_LED, strict=True):
            router.to(weight_ED.dtype).weight.data.copy_(weight_ED)
        policies = [AuxLoss(self.scope, task.coef, estimator="exact")]
        biases = [ExpertBias("sign", rate=task.bias_rate)] if task.bias_rate else []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        balancer = Balancer(model, [*policies, *biases], optimizer=optimizer)
        batches = [
            (hidden.flatten(0, 1), TokenLayout(len(hidden), None if mask is None else mask.flatten()))
            for hidden, mask in task.micro_batches
        ]
        if balancer.needs_counting and len(batches) > 1:
            with balancer.counting():
                for batch in batches:
                    for router in routers:
                        router(*batch)
        balancer.begin_step(tokens=task.tokens, micro_batches=len(batches))
        for batch in batches:
            weights = [task.forward(router, *batch)[WEIGHTS].sum() for router in routers]
            (balancer.tap(0 * torch.stack(weights).sum()) / len(batches)).backward()
        gradient_LED = torch.stack([task.average(router.weight.grad) for router in routers])  # type: ignore[arg-type]
        optimizer.step()
        found = [router.expert_bias for router in routers if router.expert_bias is not None]
        return Answer(gradient_LED, torch.stack(balancer.load()), torch.stack(found) if found else None)


class MicroBatch(GlobalBatch):
    """`AuxLoss("micro_batch")`: what Switch Transformers and most engines do."""

    name = "equipoise, micro_batch"
    scope = "micro_batch"


class Sequence(GlobalBatch):
    """`AuxLoss("sequence")`: DeepSeek-V2's expert-level loss."""

    name = "equipoise, sequence"
    scope = "sequence"


class LossFree(Sequence):
    """DeepSeek-V3: a sigmoid gate, a bias moved by the sign of the load's error, and the loss of each sequence."""

    name = "equipoise, loss-free and sequence"
    gate = "sigmoid"
    bias_rate = 1e-3
