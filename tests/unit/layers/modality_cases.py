"""Steps with unequally many tokens of each class, in float64: one process, or cut into ranks and micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from equipoise import AuxLoss, Balancer, ExpertChoiceMoE, ModalityMoE, MoE, TokenPools
from equipoise.distributed import Group

DIM, SAMPLES, LENGTH, STEPS = 6, 8, 5, 2


class Model(nn.Module):
    """Two layers of a text group and an image group; what the second sees depends on the first."""

    def __init__(self, choice: str, recompute: str = "none") -> None:
        super().__init__()
        self.recompute = recompute
        self.first = nn.Linear(DIM, DIM)
        self.layers = nn.ModuleList(
            ModalityMoE({name: self.group(choice, experts) for name, experts in (("text", 4), ("image", 2))})
            for _ in range(2)
        )
        for router in (m.gate for m in self.modules() if isinstance(m, MoE | ExpertChoiceMoE)):
            nn.init.normal_(router.weight)

    def group(self, choice: str, experts: int) -> nn.Module:
        return MoE(DIM, 4, experts, top_k=1) if choice == "token" else ExpertChoiceMoE(DIM, 4, experts)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x_BSD, ids_BS = batch
        x_BSD = self.first(x_BSD)
        for layer in self.layers:
            h_BSD = torch.tanh(x_BSD)
            if self.recompute == "none" or not torch.is_grad_enabled():
                x_BSD = x_BSD + layer(h_BSD, ids_BS)
            else:
                x_BSD = x_BSD + checkpoint(layer, h_BSD, ids_BS, use_reentrant=self.recompute == "reentrant")
        return x_BSD


def model_of(choice: str, recompute: str = "none") -> Model:
    torch.manual_seed(3)
    return Model(choice, recompute).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The last half of the sequences has no image token: cut in two, a rank or a micro-batch has none."""
    generator = torch.Generator().manual_seed(step)
    x_BSD = torch.randn(SAMPLES, LENGTH, DIM, dtype=torch.float64, generator=generator)
    ids_BS = torch.randint(0, 2, (SAMPLES, LENGTH), generator=generator)
    ids_BS[SAMPLES // 2 :] = 0
    return x_BSD, ids_BS


def train(choice: str, micro_batches: int, recompute: str = "none") -> dict[str, Tensor]:
    """What some steps leave on a rank with its equal part of every batch: weights, thresholds, last gradients."""
    group, model = Group.world(), model_of(choice, recompute)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    token = choice == "token"
    loss_of_step = AuxLoss("global_batch", coef=1.0, estimator="exact")
    balancer = Balancer(model, [loss_of_step], optimizer) if token else None
    pools = None if token else TokenPools(model, optimizer)
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        own = [one.chunk(group.size)[group.rank].chunk(micro_batches) for one in batch(step)]
        cut = list(zip(*own, strict=True))
        if balancer is not None:
            with balancer.counting():
                for one in cut:
                    model(one)
        for one in cut if pools is None else pools.micro_batches(cut, model):
            loss = (model(one) - one[0]).square().mean()
            if balancer is not None:
                (balancer.tap(loss) / micro_batches).backward()
            elif pools is not None:
                ((loss + pools.loss()) / micro_batches).backward()
        for name, p in model.named_parameters():
            p.grad = group.sum(p.grad if p.grad is not None else torch.zeros_like(p)) / group.size
            found[f"grad {name}"] = p.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
    if pools is not None:
        with torch.no_grad():
            found["evaluated"] = model.eval()(batch(99))
    return found | {name: tensor.clone() for name, tensor in model.state_dict().items()}
