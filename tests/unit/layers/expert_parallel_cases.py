"""What the ranks of test_expert_parallel.py do: the shared-out layer on a part of the tokens, the whole one on all."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from equipoise import MoE
from equipoise.distributed import Group
from equipoise.layers import Experts, shard_experts

EXPERTS, DIM, HIDDEN, TOP_K = 8, 16, 24, 3


def tokens_of(sizes: list[int], dtype: torch.dtype) -> list[Tensor]:
    """The tokens of every rank."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(size, DIM, dtype=torch.float64, generator=generator).to(dtype) for size in sizes]


def whole_layer(dtype: torch.dtype, idle: bool) -> MoE:
    """Nobody chooses the experts 2 and 3 where ``idle``."""
    torch.manual_seed(3)
    layer = MoE(DIM, HIDDEN, EXPERTS, TOP_K, num_shared=1, selection_bias=True).to(dtype)
    if idle:
        layer.gate.expert_bias[2:4] = -100.0
    return layer


def naive(layer: MoE, x_TD: Tensor) -> Tensor:
    """One token and one expert at a time."""
    logits_TE = x_TD @ layer.gate.weight.T
    probs_TE = logits_TE.softmax(dim=-1)
    rows = []
    for x_D, probs_E in zip(x_TD, probs_TE, strict=True):
        chosen = (probs_E + layer.gate.expert_bias).topk(TOP_K).indices.tolist()
        total = sum(probs_E[e] for e in chosen)
        y_D = layer.shared_experts(x_D)
        for e in chosen:
            gate_H, up_H = (layer.experts.gate_up_proj[e] @ x_D).chunk(2)
            y_D = y_D + probs_E[e] / total * (layer.experts.down_proj[e] @ (F.silu(gate_H) * up_H))
        rows.append(y_D)
    return torch.stack(rows)


def gradients(layer: MoE, x_TD: Tensor, direction_TD: Tensor, recompute: str, forward=None) -> tuple[Tensor, ...]:
    """The output and the gradients of the tokens and of all parameters."""
    x_TD = x_TD.clone().requires_grad_()
    forward = forward or layer
    y_TD = forward(x_TD) if recompute == "none" else checkpoint(forward, x_TD, use_reentrant=recompute == "reentrant")
    (y_TD * direction_TD).sum().backward()
    return (y_TD.detach(), x_TD.grad, *(p.grad for p in layer.parameters()))


def compare(sizes: list[int], dtype: str, recompute: str, idle: bool, reference: str) -> dict[str, tuple]:
    """{what: (here, of the whole layer)}; sums over tokens are added up over the ranks, as data parallelism does."""
    kind, group = getattr(torch, dtype), Group.world()
    weights = torch.float32 if kind == torch.bfloat16 else kind
    whole = whole_layer(weights, idle)
    layer = copy.deepcopy(whole)
    (experts,) = shard_experts(layer, group)
    assert experts.gate_up_proj.shape == (EXPERTS // group.size, 2 * HIDDEN, DIM)
    parts = tokens_of(sizes, kind)
    direction_TD = torch.randn(sum(sizes), DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(6)).to(
        kind
    )
    start = sum(sizes[: group.rank])
    place = slice(start, start + sizes[group.rank])
    got = gradients(layer, parts[group.rank], direction_TD[place], recompute)
    wanted = gradients(whole, torch.cat(parts), direction_TD, "none",
                       forward=None if reference == "layer" else lambda x: naive(whole, x))  # fmt: skip
    found = {"output": (got[0], wanted[0][place]), "tokens": (got[1], wanted[1][place])}
    for (name, _), mine, all_of_it in zip(layer.named_parameters(), got[2:], wanted[2:], strict=True):
        if name.startswith("experts."):
            found[name] = (mine, all_of_it[experts.shard.mine])
        else:
            found[name] = (group.sum(mine), all_of_it)
    return found


def weights_gradient(size: int, dropped: float) -> tuple[Tensor, Tensor]:
    """Of the routing weights alone, in front of Experts; so large a part of the choices is none."""
    group = Group.world()
    torch.manual_seed(1)
    whole = Experts(EXPERTS, DIM, HIDDEN).double()
    parts = tokens_of([4] * size, torch.float64)
    ids_TK = torch.randint(0, EXPERTS, (4 * size, TOP_K))  # a token may choose an expert twice
    ids_TK = ids_TK.masked_fill(torch.rand(ids_TK.shape) < dropped, EXPERTS)
    weights_TK = torch.rand(4 * size, TOP_K, dtype=torch.float64)
    mine = slice(4 * group.rank, 4 * group.rank + 4)
    local_TK = weights_TK[mine].clone().requires_grad_()
    all_TK = weights_TK.clone().requires_grad_()
    whole(torch.cat(parts), ids_TK, all_TK).square().sum().backward()
    shard_experts(whole, group)
    whole(parts[group.rank], ids_TK[mine], local_TK).square().sum().backward()
    return local_TK.grad, all_TK.grad[mine]


def drawn_anew() -> tuple[Tensor, Tensor]:
    """The weights that a shard draws, and the same part of what the whole layer draws."""
    layer, whole = Experts(EXPERTS, DIM, HIDDEN), Experts(EXPERTS, DIM, HIDDEN)
    shard_experts(layer, Group.world())
    for module in (layer, whole):
        torch.manual_seed(9)
        module.reset_parameters()
    return layer.down_proj.detach(), whole.down_proj.detach()[layer.shard.mine]


def keys_and_frozen() -> tuple[list[str], list[str], bool, bool]:
    """State keys before and after; whether frozen experts stay frozen; whether a copy still computes."""
    layer = MoE(DIM, HIDDEN, EXPERTS, TOP_K)
    before = list(layer.state_dict())
    layer.experts.requires_grad_(False)
    shard_experts(layer, Group.world())
    x = torch.randn(3, DIM)
    same = torch.equal(copy.deepcopy(layer)(x), layer(x))
    return before, list(layer.state_dict()), any(p.requires_grad for p in layer.experts.parameters()), same


def compiled() -> tuple[Tensor, Tensor]:
    """With a break in the graph, but with the same numbers."""
    layer = whole_layer(torch.float32, idle=False)
    shard_experts(layer, Group.world())
    x = torch.randn(6, DIM)
    results = []
    for forward in (layer, torch.compile(layer, backend="aot_eager")):
        layer.zero_grad()
        forward(x).square().sum().backward()
        results.append(torch.cat([p.grad.flatten() for p in layer.parameters()]))
    return results[0], results[1]


def wrong_id() -> None:
    experts = Experts(EXPERTS, DIM, HIDDEN)
    shard_experts(experts, Group.world())
    experts(torch.randn(1, DIM), torch.tensor([[EXPERTS + 1]]), torch.ones(1, 1))


def shared_out_twice() -> None:
    layer = MoE(DIM, HIDDEN, EXPERTS, TOP_K)
    shard_experts(layer, Group.world())
    shard_experts(layer, Group.world())


def cannot_be_shared() -> None:
    shard_experts(MoE(DIM, HIDDEN, 6, TOP_K), Group.world())


def cast_on_the_way() -> tuple[Tensor, Tensor]:
    """Under autocast the rows travel in bf16; the numbers are those of the whole layer under autocast."""
    layer = whole_layer(torch.float32, idle=False)
    x = torch.randn(5, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        shard_experts(layer, Group.world())
        after = layer(x)
    return after.detach(), before.detach()
