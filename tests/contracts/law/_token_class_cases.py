"""Steps whose tokens are of classes, and the law of one class by loops; and what runs in each rank."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from contracts.law._model import Net, gradients
from contracts.law._reference import Seen, fraction, naive_view, token_values, watch_routers
from equipoise import AuxLoss, Balancer

DIM = 8
NAMES = ("text", "image")  # of kinds 0 and 1; a token of kind 2 is of no class


class Kinds(NamedTuple):
    x_BSD: Tensor
    target_BSD: Tensor
    mask_BS: Tensor
    documents_BS: Tensor
    kinds_BS: Tensor

    @property
    def classes(self) -> dict[str, Tensor]:
        return {name: self.kinds_BS == number for number, name in enumerate(NAMES)}


class ClassNet(Net):
    def forward(self, x_BSD: Tensor, micro: Kinds) -> Tensor:  # type: ignore[override]
        h = self.inp(x_BSD)
        for block in self.blocks:
            said = {"document_ids_BS": micro.documents_BS, "token_classes_BS": micro.classes}
            h = h + self._run(functools.partial(block, token_mask_BS=micro.mask_BS, **said), h)
        return h


def class_net(**options: Any) -> Any:
    torch.manual_seed(0)
    return ClassNet(**{"experts": (6, 6), "gate": "sigmoid"} | options).double()


def make_kinds(seed: int = 0, *, sequences: int = 4, length: int = 5, even: bool = False) -> Kinds:
    """Pictures in the first sequences alone, so that micro-batches differ in them and the last has none."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(sequences, length, DIM, generator=draw) + 1.5 * torch.randn(sequences, 1, DIM, generator=draw)
    kinds = torch.randint(0, 3, (sequences, length), generator=draw)
    kinds[kinds == 1] = 0
    for i in range(sequences - 1):
        kinds[i, : length - 1 - i] = 1
    mask = torch.rand(sequences, length, generator=draw) < (2.0 if even else 0.8)
    documents = torch.randint(0, 2, (sequences, length), generator=draw).cumsum(1).clamp(max=length - 1)
    target = torch.randn(sequences, length, DIM, generator=draw)
    return Kinds((x + 2.0 * (kinds == 1).unsqueeze(-1)).double(), target.double(), mask, documents, kinds)


def cut_kinds(whole: Kinds, parts: int) -> list[Kinds]:
    return [Kinds(*fields) for fields in zip(*(tensor.chunk(parts) for tensor in whole), strict=True)]


def loss_of(model: Any, micro: Kinds) -> Tensor:
    return (model(micro.x_BSD, micro) - micro.target_BSD).square().mean()


# ------------------------------------------------------------------------------------------------ the law by loops


def members(micro: Kinds, name: str | None) -> list[bool]:
    """Whether a token is no padding and of the class."""
    valid = micro.mask_BS.reshape(-1).tolist()
    if name is None:
        return valid
    kinds = micro.kinds_BS.reshape(-1).tolist()
    return [real and kind == NAMES.index(name) for real, kind in zip(valid, kinds, strict=True)]


class Tally:
    """Choices and tokens of a class and of all."""

    def __init__(self, seen: Seen | None = None, own: list[bool] | None = None, experts: int = 6) -> None:
        self.load, self.choices, self.own, self.tokens = [0.0] * experts, 0.0, 0.0, 0.0
        for t, chosen in enumerate(seen.ids if seen else []):
            if seen and own and seen.mask_T[t]:
                self.tokens, self.choices, self.own = self.tokens + 1, self.choices + len(chosen), self.own + own[t]
                for e in chosen:
                    self.load[e] += own[t]

    def plus(self, other: Tally, factor: float = 1.0) -> Tally:
        total = Tally(experts=len(self.load))
        total.load = [a + factor * b for a, b in zip(self.load, other.load, strict=True)]
        for what in ("choices", "own", "tokens"):
            setattr(total, what, getattr(self, what) + factor * getattr(other, what))
        return total

    @property
    def size(self) -> float:
        return self.choices + self.tokens


def estimate(estimator: str, tallies: list[Tally], m: int, past: list[Tally]) -> Tally:
    """What a step holds, as micro-batch m knows it; ``past``: of the steps before in which the class had a token."""
    so_far = functools.reduce(Tally.plus, tallies[: m + 1])
    match estimator:
        case "prefix":
            return so_far
        case "exact":
            return functools.reduce(Tally.plus, tallies)
        case "previous":
            return past[-1] if past else Tally()
        case "filled":
            return so_far.plus(past[-1], max(past[-1].size - so_far.size, 0) / past[-1].size) if past else so_far
    total = Tally()
    for age, one in enumerate(reversed(past)):
        total = total.plus(one, 0.9**age / one.size)
    return total


def fractions(
    seen: Seen, own: list[bool], micro: Kinds, policy: dict, known: Tally, beside: Tally
) -> list[list[float]]:
    """f of every token; ``beside``: of the micro-batches that run at once."""
    documents = micro.documents_BS.reshape(-1).tolist()

    def mates(t: int) -> list[int]:
        row = range(t // seen.length * seen.length, (t // seen.length + 1) * seen.length)
        return [u for u in row if policy["scope"] == "sequence" or documents[u] == documents[t]]

    def of(tokens: Any) -> list[float]:
        load = [0] * seen.num_experts
        for t in tokens:
            for e in seen.ids[t] if own[t] else ():
                load[e] += 1
        return fraction(load)

    everything = range(len(own))
    if policy["scope"] in ("sequence", "document"):
        return [of(mates(t)) for t in everything]
    f = of(everything)
    if policy["scope"] in ("global_batch", "data_parallel"):
        f = fraction((known if policy["scope"] == "global_batch" else beside).load)
    return [f] * len(own)


class Expected(NamedTuple):
    gradients: dict[str, Tensor]
    values: list[float | None]  # of each policy: mean over layers; None: it has no token


def reference(
    model: Any,
    step: list[Kinds],
    policies: list[dict],
    past: dict[Any, list[Tally]] | None = None,
    *,
    even: bool = False,
    ranks: int = 1,
) -> Expected:
    """The model's loss and that of every policy: coef E <f_c, p_t> / T_c for a token t of the class.

    T_c is share times T, of the step; ``even``: T is as many times the micro-batch's as there are of them.
    ``ranks``: so many neighbours of ``step`` run at once.
    """
    seen: list[list[Seen]] = []
    past = {} if past is None else past
    hooks = watch_routers(model, seen)
    total = torch.zeros((), dtype=torch.float64)
    for micro in step:
        seen.append([])
        total = total + loss_of(model, micro) / len(step)
    for hook in hooks:
        hook.remove()
    values, layers = [], len(seen[0])
    tokens = sum(one[0].num_valid for one in seen)
    for number, policy in enumerate(policies):
        per_layer = []
        for layer in range(layers):
            own = [members(micro, policy["tokens"]) for micro in step]
            tallies = [Tally(seen[m][layer], own[m]) for m in range(len(step))]
            history, value = past.setdefault((number, layer), []), 0.0
            for m, micro in enumerate(step):
                first, one = m // ranks * ranks, seen[m][layer]
                known = estimate(policy["estimator"], tallies, first + ranks - 1, history)
                beside = functools.reduce(Tally.plus, tallies[first : first + ranks])
                if not any(own[m]):
                    continue
                f_TE = [naive_view(f, policy) for f in fractions(one, own[m], micro, policy, known, beside)]
                pushed = Seen(one.logits_TE, one.gate, one.top_k, one.num_sequences, own[m], None, one.bias_E, 1, 1)
                v = token_values(pushed, f_TE).sum()
                share = known.own / known.tokens if known.tokens else 0.0
                of_all = len(step) * one.num_valid if even else tokens
                total = total + (policy["coef"] * v / (of_all * share) if share else 0.0)
                value += float(v.detach())
            whole = functools.reduce(Tally.plus, tallies)
            per_layer.append(value / whole.own if whole.own else None)
            history += [whole] if whole.own else []
        values.append(None if None in per_layer else sum(per_layer) / layers)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(total, parameters, allow_unused=True)
    return Expected({n: g for n, g in zip(names, grads, strict=True) if g is not None}, values)


# ------------------------------------------------------------------------------------------------ the library


def policy_of(description: dict) -> AuxLoss:
    return AuxLoss(**description)


def class_step(
    model: Any, balancer: Balancer, optimizer: torch.optim.Optimizer, step: list[Kinds], declared: float | None = None
) -> dict[str, Tensor]:
    if declared is not None:
        balancer.begin_step(tokens=declared, micro_batches=len(step))
    if balancer.needs_counting and len(step) > 1:
        with balancer.counting():
            for micro in step:
                model(micro.x_BSD, micro)
    for micro in step:
        (balancer.tap(loss_of(model, micro)) / len(step)).backward()
    found = gradients(model)
    optimizer.step()
    optimizer.zero_grad()
    return found


def trained(descriptions: list[dict], micro_batches: int, steps: int = 1) -> list[tuple[dict, dict[str, float]]]:
    """For each step: the gradients of this rank, and metrics; its part of the sequences is one of as many as ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = class_net()
    balancer = Balancer(model, [policy_of(one) for one in descriptions])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    found = []
    for seed in range(steps):
        whole = make_kinds(seed)
        part = cut_kinds(cut_kinds(whole, size)[rank], micro_batches)
        got = class_step(model, balancer, optimizer, part, declared=int(whole.mask_BS.sum()))
        found.append((got, balancer.metrics(layers=False)))
    return found
