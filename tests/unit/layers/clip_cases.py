"""What the ranks of test_clip.py do: clip shared-out experts, and step, beside the whole layer on all tokens."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from equipoise import MoE, clip_grad_norm_
from equipoise.distributed import Group
from equipoise.layers import shard_experts

DIM = 8


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(DIM, DIM), MoE(DIM, 12, 8, 2, num_shared=1), MoE(DIM, 12, 4, 2)).double()


def tokens_of(size: int) -> torch.Tensor:
    return 3 * torch.randn(size, 6, DIM, generator=torch.Generator().manual_seed(4)).double()


def combine(model: nn.Module, group: Group) -> None:
    """Gradients as a mean over the ranks: experts got all tokens of the group already."""
    for name, p in model.named_parameters():
        p.grad = (p.grad if ".experts." in name else group.sum(p.grad)) / group.size


def whole_norm(model: nn.Module, norm_type: float) -> float:
    """By a loop over all numbers."""
    numbers = [abs(x) for p in model.parameters() for x in p.grad.flatten().tolist()]
    return max(numbers) if norm_type == math.inf else math.fsum(x**norm_type for x in numbers) ** (1 / norm_type)


def clipped(max_norm: float, norm_type: float) -> dict:
    """Of one step: the norm here and of the whole model by loops; parameters after the step, and wanted."""
    group = Group.world()
    whole = model_of()
    model = copy.deepcopy(whole)
    shares = shard_experts(model, group)
    x = tokens_of(group.size)
    model(x[group.rank]).square().mean().backward()
    combine(model, group)
    whole(x.view(-1, DIM)).square().mean().backward()
    wanted = whole_norm(whole, norm_type)
    if wanted > max_norm:
        for p in whole.parameters():
            p.grad *= max_norm / (wanted + 1e-6)
    got = clip_grad_norm_(model, max_norm, norm_type=norm_type)
    for one in (model, whole):
        torch.optim.SGD(one.parameters(), lr=0.5).step()
    mine = [experts.shard.mine for experts in shares for _ in range(2)]
    after, shared_out = [], []
    for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        (shared_out if ".experts." in name else after).append((p.detach(), q.detach()))
    shared_out = [(p, q[place]) for (p, q), place in zip(shared_out, mine, strict=True)]
    return {"norm": got.item(), "wanted": wanted, "after": after, "shared_out": shared_out}


def plain_clip_parts() -> tuple[float, float]:
    """What torch's own makes of it: the norm and a number of the router's weight after the step, another per rank."""
    group = Group.world()
    model = model_of()
    shard_experts(model, group)
    model(tokens_of(group.size)[group.rank]).square().mean().backward()
    combine(model, group)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05).item()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    return norm, model[1].gate.weight.detach().sum().item()


def not_finite(norm_type: float, value: float) -> tuple[str, float, bool]:
    """One rank's expert has a number that is none: every rank says so and changes nothing."""
    group = Group.world()
    model = model_of()
    first, _ = shard_experts(model, group)
    model(tokens_of(group.size)[group.rank]).square().mean().backward()
    combine(model, group)
    if group.rank == group.size - 1:
        first.down_proj.grad[0, 0, 0] = value
    before = [p.grad.clone() for p in model.parameters()]
    try:
        clip_grad_norm_(model, 1.0, norm_type=norm_type, error_if_nonfinite=True)
        said = "nothing"
    except RuntimeError as error:
        said = str(error)
    pairs = zip(model.parameters(), before, strict=True)
    same = all(torch.equal(p.grad.nan_to_num(7.0), g.nan_to_num(7.0)) for p, g in pairs)
    return said, clip_grad_norm_(model, math.inf, norm_type=norm_type).item(), same


def without_gradients() -> float:
    """A rank whose experts have no gradient takes part all the same."""
    model = model_of()
    first, _ = shard_experts(model, Group.world())
    if Group.world().rank == 0:
        first.down_proj.grad = torch.full_like(first.down_proj, 2.0)
    return clip_grad_norm_(model, math.inf).item()


def stages() -> tuple[float, float, float]:
    """Ranks 0, 1 hold the first layer, ranks 2, 3 the second: the norm over both, and of the whole."""
    import torch.distributed as dist

    layers, groups = model_of(), [Group(dist.new_group(pair)) for pair in ([0, 1], [2, 3], [0, 2], [1, 3])]  # type: ignore[arg-type]
    rank = Group.world().rank
    torch.manual_seed(7)
    for p in layers.parameters():
        p.grad = torch.randn_like(p)
    wanted = whole_norm(layers, 2.0)
    experts, others = groups[rank // 2], groups[2 + rank % 2]
    mine = layers[:2] if rank < 2 else layers[2:]
    whole = {name: p.grad for name, p in mine.named_parameters()}
    shares = shard_experts(mine, experts)
    for name, p in mine.named_parameters():
        p.grad = whole[name][shares[0].shard.mine] if ".experts." in name else whole[name]
    got = clip_grad_norm_(mine, 0.5, group=others).item()
    return got, wanted, clip_grad_norm_(list(mine), math.inf, group=others).item()


def sharded_again() -> tuple[float, float, float]:
    """Four ranks: two share out the experts, two replicas of each shard them by FSDP, all four the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole, model = model_of(), model_of()
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "parts"))
    flat = init_device_mesh("cpu", (4,))
    shares = shard_experts(model, Group(grid.get_group("parts")))
    for experts in shares:
        fully_shard(experts, mesh=grid["replicas"])
    fully_shard(model, mesh=flat)
    x, rank = tokens_of(4), Group.world().rank
    model(x[rank]).square().mean().backward()
    for experts in shares:
        for p in experts.parameters():
            p.grad.to_local().div_(2)
    whole(x.view(-1, DIM)).square().mean().backward()
    got = clip_grad_norm_(model, 0.5).item()
    return got, whole_norm(whole, 2.0), clip_grad_norm_(model, math.inf).item()
