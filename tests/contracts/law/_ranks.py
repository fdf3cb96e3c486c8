"""What runs in each rank for test_around_a_step.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from contracts.law._model import loss_of, make_step, net
from equipoise import AuxLoss, Balancer, ConfigError, EquipoiseError, ExpertBias, MoE, Ranks, StateError
from equipoise.distributed import Group


def made_too_early() -> str:
    """A balancer that thinks it is alone; only then the process group."""
    options: dict[str, Any] = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    ranks = Ranks(assumed=True)  # what Ranks.default() gave before init_process_group
    model = net(experts=(4,), top_k=(2,))
    balancer = Balancer(model, [AuxLoss("global_batch", 0.3)], ranks=ranks)
    assert options["world_size"] == 2
    try:
        balancer.tap(loss_of(model, make_step(0)[0])).backward()
    except StateError as error:
        return str(error)
    return ""


def different_layers() -> str:
    layer = MoE(8, 8, 4 if dist.get_rank() else 6, 2)
    try:
        Balancer(layer, [AuxLoss("global_batch", 0.3), ExpertBias("proportional", rate=0.01)])
    except ConfigError as error:
        assert layer.gate.balance_state is layer.gate.expert_bias is None, "refused, and left as it was"
        return str(error)
    return ""


def mesh_axes() -> dict[str, Any]:
    def members(ranks: Ranks) -> tuple[list[int], ...]:
        me = [dist.get_rank()]
        groups = (ranks.data, ranks.sequence_shards, ranks.all)
        return tuple(group.members if group.size > 1 else me for group in groups)

    found: dict[str, Any] = {}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    found["dp, cp"] = members(Ranks.from_mesh(mesh, data=("dp",), sequence_shards=("cp",)))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    found["dp, tp"] = members(Ranks.from_mesh(mesh, data=("dp",)))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    found["pp, dp"] = members(Ranks.from_mesh(mesh, data=("dp",), pipeline=("pp",)))
    try:
        Ranks.from_mesh(init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp")), data=("ddp",))
    except ConfigError as error:
        found["wrong"] = str(error)
    return found


def one_leaves() -> str:
    group = Group.world()
    if group.rank == 1:
        return "left"
    try:
        for _ in range(1000):  # until the other's connections are closed
            group.sum(torch.ones(3))
    except EquipoiseError as error:
        return str(error)
    return ""


def shuffle_pool() -> tuple[list[int], list[int]]:
    """(counts of the pooled choices, counts of the step) on this rank; ranks hold different numbers of tokens."""
    rank = dist.get_rank()
    model = net(experts=(5,), top_k=(2,))
    balancer = Balancer(model, [AuxLoss("shuffle", 0.3)])
    optimizer = torch.optim.SGD(nn.ModuleList([model]).parameters(), lr=0.01)
    step = make_step(rank, micro_batches=2, sequences=2 + rank)
    with balancer.counting():
        for micro in step:
            model(micro.x_BSD)
    pools = balancer._groups[0].pools
    assert pools is not None
    counts = torch.bincount(pools[0].flatten(), minlength=5).tolist()
    for micro in step:
        (balancer.tap(loss_of(model, micro)) / 2).backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
    optimizer.step()
    return counts, balancer.load()[0].tolist()


def exact_in_one_pass(sequences: int) -> tuple[list[float], float, list[int]]:
    """(gradient of the router, value of the loss, load) of a step in one pass, without counting it before."""
    torch.manual_seed(0)
    model = MoE(8, 16, 6, 2, batch_first=True).double()
    x_BSD = torch.randn(sequences, 5, 8, dtype=torch.float64).chunk(dist.get_world_size())[dist.get_rank()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    balancer = Balancer(
        model, [AuxLoss("global_batch", 0.5, estimator="exact")], sequences_per_micro_batch=1, ranks=Ranks.default()
    )
    balancer.tap(model(x_BSD).square().mean()).backward()
    gradient = model.gate.weight.grad
    assert gradient is not None
    dist.all_reduce(gradient)
    gradient /= dist.get_world_size()
    optimizer.step()
    return (
        gradient.flatten().tolist(),
        balancer.metrics()[f"balance/{balancer.schedule.names[0]}/loss"],
        balancer.load()[0].tolist(),
    )


def evaluated(only: int | None = None) -> dict[str, float]:
    """An evaluation of four batches, dealt out to the ranks, or all on one of them."""
    model = net().eval()
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = make_step(seed=3, micro_batches=4, masked=True)
    with Balancer(model, [AuxLoss("sequence", 0.3)]).evaluation() as found:
        for i, one in enumerate(batches):
            if rank == (i % size if only is None else only):
                model(one.x_BSD, one.mask_BS)
    return found
