"""Routers as people write them, a model around them, and the law of what they are pushed by, in naive float64 loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _named import named

__all__ = ["Block", "Chain", "Gate", "ids_of", "naive_law", "naive_push", "pushed"]

E, K, D = 4, 2, 8


class Gate(nn.Module):
    """``kind`` is what it does beside softmax and topk; what it did last is in ``seen`` where it ``keeps`` it."""

    def __init__(
        self, kind: str = "plain", gate: str = "softmax", experts: int = E, k: int = K, *, keeps: bool = True
    ) -> None:
        super().__init__()
        self.kind, self.gate, self.k, self.keeps = kind, gate, k, keeps
        self.linear = nn.Linear(D, experts, bias=False)
        self.register_buffer("calls", torch.zeros(1))
        self.seen: tuple[Tensor, Tensor, Tensor] | None = None

    def scores(self, z: Tensor) -> Tensor:
        match self.gate:
            case "softmax":
                return z.softmax(dim=-1)
            case "sigmoid":
                return z.sigmoid()
        return torch.where(z < -40, (0.5 * z.clamp(max=0)).exp(), F.softplus(z.clamp(min=-40)).sqrt())

    def forward(self, x: Tensor) -> Any:
        kind, on = self.kind, self.training
        if on:
            self.calls += 1
        if kind == "jitter" and on:
            x = x * (1 + 0.3 * (torch.rand_like(x) - 0.5))
        z = shown = self.linear(x)
        experts = z.shape[-1]
        if kind in ("noise shown", "noise hidden") and on:
            z = z + torch.randn_like(z)
        if kind in ("mask shown", "mask hidden") and on:
            z = z.masked_fill(torch.arange(experts) == experts - 1, float("-inf"))
        if kind == "dropped experts" and on:
            z = z.masked_fill(torch.rand(experts).topk(1).indices == torch.arange(experts), float("-inf"))
        if kind == "groups":
            best = z.unflatten(-1, (2, -1)).amax(dim=-1).argmax(dim=-1, keepdim=True)
            z = z.masked_fill(torch.arange(experts) // (experts // 2) != best, float("-inf"))
        weights, ids = self.scores(z).topk(self.k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        if kind == "dropout" and on:
            weights = F.dropout(weights, 0.3)
        if kind == "dropped choices" and on:
            ids = ids.masked_fill(torch.rand(ids.shape) < 0.3, -1)
        if kind == "dynamic k":  # the second choice only where the first is not sure
            ids = torch.cat([ids[..., :1], ids[..., 1:].masked_fill(weights[..., :1] > 0.6, -1)], dim=-1)
        if kind in ("noise shown", "mask shown", "groups shown"):
            shown = z
        if self.keeps:
            self.seen = (shown, weights, ids)
        return self.output(shown, weights, ids)

    def output(self, z: Tensor, weights: Tensor, ids: Tensor) -> Any:
        return z, weights, ids


class Block(nn.Module):
    """``take`` finds weights and ids in what its router returns."""

    def __init__(self, router: nn.Module, take: Callable[[Any], tuple[Tensor, Tensor]] = lambda out: out[1:]) -> None:
        super().__init__()
        self.router, self.take = router, take
        self.experts = nn.Parameter(torch.randn(E, D, D) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixed(x, *self.take(self.router(x)))

    def mixed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        flat, weights, ids = x.flatten(0, -2), weights.flatten(0, -2), ids.flatten(0, -2)
        y = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            row, k = (ids == e).nonzero(as_tuple=True)
            y = y.index_add(0, row, (flat[row] @ expert) * weights[row, k, None])
        return y.view_as(x)


class Chain(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def ids_of(ids: Tensor) -> list[list[int]]:
    return ids.flatten(0, -2).tolist()


def naive_probs(z: Tensor, gate: str) -> list[dict[int, Tensor]]:
    """Of each token, p of the experts that it may choose; the others do not exist."""
    out = []
    for row in z.flatten(0, -2).double():
        here = {e: row[e] for e in range(len(row)) if row[e] > float("-inf")}
        match gate:
            case "softmax":
                top = max(float(v.detach()) for v in here.values())
                s = {e: (v - top).exp() for e, v in here.items()}
            case "sigmoid":
                s = {e: 1 / (1 + (-v).exp()) for e, v in here.items()}
            case _:
                s = {e: v.exp().log1p().sqrt() for e, v in here.items()}
        total = sum(s.values())
        out.append({e: v / total for e, v in s.items()})
    return out


def naive_law(
    z: Tensor, ids: Sequence[Sequence[int]], gate: str, groups: Sequence[Sequence[int]] | None = None
) -> tuple[Tensor, list[int]]:
    """(mean over tokens of E <f, p> with f of the token's group, the load); a choice of -1 is none."""
    experts, tokens = z.shape[-1], len(ids)
    probs, load = naive_probs(z, gate), [0] * experts
    total = torch.zeros((), dtype=torch.float64)
    for group in groups or [range(tokens)]:
        counts = [0] * experts
        for t in group:
            for e in ids[t]:
                if e >= 0:
                    counts[e] += 1
        load = [a + b for a, b in zip(load, counts, strict=True)]
        for t in group:
            for e, p in probs[t].items():
                total = total + experts * counts[e] / max(1, sum(counts)) * p
    return total / tokens, load


def naive_push(x: Tensor, weight: Tensor, ids: Any, gate: str, groups: Any = None, hidden: Any = None) -> Tensor:
    """The gradient of the law at the gate's weight. ``hidden``: which logits are -inf."""
    w = weight.detach().double().requires_grad_()
    z = x.detach().double().flatten(0, -2) @ w.T
    if hidden is not None:
        z = z.masked_fill(hidden, float("-inf"))
    naive_law(z, ids, gate, groups)[0].backward()
    assert w.grad is not None
    return w.grad


def pushed(
    model: nn.Module, at: nn.Parameter, x: Tensor, policies: Callable[[float], list], **call: Any
) -> tuple[Tensor, dict, list[Tensor]]:
    """(gradient ``at`` that the policies add per unit of coefficient, metrics, loads): with them, less without."""
    from equipoise import Balancer

    found = []
    for coef in (0.5, 0.0):
        model.zero_grad(set_to_none=True)
        balancer = Balancer(model, named(policies(coef)), example={"x": x, **call})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        torch.manual_seed(3)
        model.train()
        balancer.tap(model(x, **call).square().mean()).backward()
        optimizer.step()
        assert at.grad is not None
        found.append((at.grad.clone(), balancer.metrics(), balancer.load()))
        balancer.remove()
    (with_it, metrics, load), (without, _, _) = found
    return (with_it - without) / 0.5, metrics, load
