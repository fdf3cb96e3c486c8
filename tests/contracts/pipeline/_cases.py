"""Pipelines by PyTorch's own schedules: what runs in each rank, for test_schedules.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as torch_schedules
from torch.utils.checkpoint import checkpoint

from _named import named
from contracts.law._model import policy
from equipoise import Balancer, ExpertBias, MoE, Ranks

DIM, LENGTH, SEQUENCES = 8, 5, 2
EXPERTS = {"": (5, 6, None, 7), "dense stage": (5, 6, None, None)}  # of four blocks; None is a dense one
BIAS = {"rule": "sign", "rate": 0.01}


class Block(nn.Module):
    """Residual: dense, or a MoE layer."""

    def __init__(self, experts: int | None) -> None:
        super().__init__()
        self.mlp = nn.Linear(DIM, DIM) if experts is None else MoE(DIM, 8, experts, 2, gate="sigmoid", batch_first=True)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return x_BSD + 0.1 * self.mlp(x_BSD)


class Whole(nn.Module):
    """All blocks; names are those of the stages."""

    def __init__(self, schedule: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        experts = EXPERTS["dense stage" if "dense stage" in schedule else ""]
        self.layers = nn.ModuleDict({str(i): Block(e) for i, e in enumerate(experts)})

    def forward(self, x_BSD: Tensor, *_: Any) -> Tensor:
        for block in self.layers.values():
            x_BSD = block(x_BSD)
        return x_BSD


class Stage(nn.Module):
    """Some of the blocks; ``tap`` is set once the balancer is there."""

    def __init__(self, whole: Whole, blocks: list[int], recompute: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): whole.layers[str(i)] for i in blocks})
        self.recompute = recompute

    def forward(self, x_BSD: Tensor) -> Tensor:
        for block in self.layers.values():
            x_BSD = checkpoint(block, x_BSD, use_reentrant=False) if self.recompute else block(x_BSD)  # type: ignore
        return x_BSD


def batch(step: int, micro_batches: int, replica: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(31 * step + 7 * replica)
    centre = 1.5 * torch.randn(micro_batches * SEQUENCES, 1, DIM, generator=generator)
    x = torch.randn(micro_batches * SEQUENCES, LENGTH, DIM, generator=generator) + centre
    return x, torch.randn(x.shape, generator=generator)


def loss_of(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().mean()


SCHEDULES: dict[str, tuple[str, list[list[list[int]]]]] = {  # name -> (class, rank -> its stages -> their blocks)
    "gpipe": ("ScheduleGPipe", [[[0, 1]], [[2, 3]]]),
    "1f1b": ("Schedule1F1B", [[[0, 1]], [[2, 3]]]),
    "1f1b, dense stage": ("Schedule1F1B", [[[0, 1]], [[2, 3]]]),
    "interleaved": ("ScheduleInterleaved1F1B", [[[0], [2]], [[1], [3]]]),
    "zero bubble": ("ScheduleInterleavedZeroBubble", [[[0], [2]], [[1], [3]]]),
    "zero bubble V": ("ScheduleZBVZeroBubble", [[[0], [3]], [[1], [2]]]),
    "dual pipe V": ("ScheduleDualPipeV", [[[0], [3]], [[1], [2]]]),
}


def run_pipeline(
    name: str, policies: list[dict], steps: int, micro_batches: int, recompute: bool, data: int = 1, told: bool = True
) -> dict[str, Any]:
    """Trains some steps; returns this rank's gradients per step, its biases, and what the balancer says."""
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2, data), mesh_dim_names=("pp", "dp"))
    group, rank, replica = mesh.get_group("pp"), mesh.get_local_rank("pp"), mesh.get_local_rank("dp")
    kind, places = SCHEDULES[name]
    whole = Whole(name)
    chunks = [Stage(whole, blocks, recompute) for blocks in places[rank]]
    number = sum(len(held) for held in places)
    order = sorted((min(blocks), r, i) for r, held in enumerate(places) for i, blocks in enumerate(held))
    place = {(r, i): at for at, (_, r, i) in enumerate(order)}
    balancer = Balancer(
        chunks,
        named([*map(policy, policies), ExpertBias(**BIAS)]),
        ranks=Ranks.from_mesh(mesh, data=("dp",), pipeline=("pp",)),
    )
    for i, chunk in enumerate(chunks):
        if place[rank, i] < number - 1:  # no loss here: tap the activations; the schedule divides by M at the end
            chunk.register_forward_hook(lambda _m, _a, y: balancer.tap(y, scale=1.0))
    shape = torch.empty(SEQUENCES, LENGTH, DIM)
    static = {"input_args": (shape.requires_grad_(),), "output_args": (shape.requires_grad_(),)} if told else {}
    stages = [
        PipelineStage(chunk, place[rank, i], number, torch.device("cpu"), group=group, **static)
        for i, chunk in enumerate(chunks)
    ]
    make: Any = getattr(torch_schedules, kind)
    several = issubclass(make, torch_schedules.PipelineScheduleMulti)
    schedule = make(
        stages if several else stages[0], micro_batches, loss_fn=lambda y, target: balancer.tap(loss_of(y, target))
    )
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    first, last = place.get((rank, 0)) == 0, number - 1 in [place[rank, i] for i in range(len(chunks))]
    gradients = []
    for step in range(steps):
        x, target = batch(step, micro_batches, replica)
        schedule.step(*([x] if first else []), **({"target": target} if last else {}))
        for p in parameters:
            if p.grad is not None and data > 1:
                dist.all_reduce(p.grad, group=mesh.get_group("dp"))
                p.grad /= data
        gradients.append(
            {n: p.grad.clone() for chunk in chunks for n, p in chunk.named_parameters() if p.grad is not None}
        )
        optimizer.step()
        optimizer.zero_grad()
    biases = {n: b.clone() for chunk in chunks for n, b in chunk.named_buffers()}
    loads = [counts_E.tolist() for counts_E in balancer.load()]
    return {"gradients": gradients, "biases": biases, "loads": loads, "metrics": balancer.metrics()}
