"""A small model whose experts choose, in float64: one process, or the same steps cut into ranks and micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from equipoise import ExpertChoiceMoE, TokenPools
from equipoise.distributed import Group

DIM, SAMPLES, LENGTH, STEPS, DECAY = 6, 8, 5, 3, 0.7
RECOMPUTE = ("none", "reentrant", "non_reentrant")


class Model(nn.Module):
    """Two layers, so that what the second sees depends on what the first chose."""

    def __init__(self, scope: str | int, recompute: str = "none", capacity: float = 1.0) -> None:
        super().__init__()
        self.recompute = recompute
        self.first = nn.Linear(DIM, DIM)
        self.layers = nn.ModuleList(
            ExpertChoiceMoE(DIM, 4, num_experts=4, scope=scope, capacity=capacity) for _ in range(2)
        )
        for layer in self.layers:
            nn.init.normal_(layer.gate.weight)

    def block(self, layer: nn.Module, x_BSD: Tensor) -> Tensor:
        return x_BSD + layer(torch.tanh(x_BSD))

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.first(x_BSD)
        for layer in self.layers:
            if self.recompute == "none" or not torch.is_grad_enabled():
                x_BSD = self.block(layer, x_BSD)
            else:
                x_BSD = checkpoint(self.block, layer, x_BSD, use_reentrant=self.recompute == "reentrant")
        return x_BSD


def model_of(scope: str | int, recompute: str = "none", capacity: float = 1.0) -> Model:
    torch.manual_seed(3)
    return Model(scope, recompute, capacity).double()


def batch(step: int) -> Tensor:
    return torch.randn(SAMPLES, LENGTH, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def train(scope: str | int, recompute: str, micro_batches: int, capacity: float = 1.0) -> dict[str, Tensor]:
    """What ``STEPS`` steps leave on a rank with its equal part of every batch: weights, thresholds, last gradients."""
    group, model = Group.world(), model_of(scope, recompute, capacity)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pools = TokenPools(model, optimizer, decay=DECAY)
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        own = batch(step).chunk(group.size)[group.rank].chunk(micro_batches)
        for x_BSD in pools.micro_batches(own, model):
            loss = (model(x_BSD) - x_BSD).square().mean() + pools.loss()
            (loss / micro_batches).backward()
        for name, p in model.named_parameters():
            p.grad = group.sum(p.grad if p.grad is not None else torch.zeros_like(p)) / group.size
            found[f"grad {name}"] = p.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        found["evaluated"] = model.eval()(batch(99))
    return found | {name: tensor.clone() for name, tensor in model.state_dict().items()}


def gradients(recompute: str, parts: list[list[int]]) -> dict[str, Tensor]:
    """Of one step, with so many samples in each micro-batch of each rank. The model's loss is a sum, that of the
    predictors weighs itself for a mean over micro-batches and ranks, so that no cut can show."""
    group, model = Group.world(), model_of("global_batch", recompute)
    pools = TokenPools(model, torch.optim.SGD(model.parameters(), lr=0.1))
    of_ranks = batch(0).split([sum(sizes) for sizes in parts])
    for x_BSD in pools.micro_batches(of_ranks[group.rank].split(parts[group.rank]), model):
        out_BSD = model(x_BSD.clone().requires_grad_())
        (out_BSD.square().sum() + pools.loss() / (len(parts) * len(parts[0]))).backward()
    return {name: group.sum(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def alone(scope: str) -> str:
    """A rank whose layer nobody has joined to the others."""
    try:
        ExpertChoiceMoE(DIM, 4, 4, scope=scope)(torch.randn(4, 4, DIM))
    except RuntimeError as error:
        return str(error)
    return "nothing"
