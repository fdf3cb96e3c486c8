"""A second opinion on every formula: naive loops over tokens in float64 that import nothing from equipoise.

A layer of one micro-batch is a ``Seen``: what a router saw and what follows from it by loops. A policy is a plain dict:
``{"kind": "aux", "scope": ..., "coef": ..., "estimator": ..., "n": ..., "counts": ..., "decay": ...}`` or
``{"kind": "z", "coef": ...}``. Load fractions f are lists of E floats; gradients come from autograd on these formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


def naive_scores(logits_TE: Tensor, gate: str) -> Tensor:
    """Un-normalised gate scores (softmax: already normalised), float64, one formula per gate."""
    z = logits_TE.double()
    if gate == "softmax":
        e = torch.exp(z - z.detach().max(dim=1, keepdim=True).values)
        return e / e.sum(dim=1, keepdim=True)
    if gate == "sigmoid":
        return 1 / (1 + torch.exp(-z))
    if gate == "sqrt_softplus":
        return torch.sqrt(torch.log1p(torch.exp(z)))
    raise AssertionError(gate)


def naive_probs(logits_TE: Tensor, gate: str) -> Tensor:
    s = naive_scores(logits_TE, gate)
    return s / s.sum(dim=1, keepdim=True)


def naive_chosen_by(logits_TE: Tensor, gate: str, bias_E: list[float], place: str) -> list[list[float]]:
    """What a selection bias makes of the scores that a choice is made by."""
    bias = torch.tensor(bias_E, dtype=torch.float64)
    if place == "logits":
        return naive_scores(logits_TE.double() + bias, gate).tolist()
    scores_TE = naive_scores(logits_TE, gate)
    return (scores_TE * (1 + bias) if place == "multiply" else scores_TE + bias).tolist()


def naive_select(score: list[float], top_k: int, groups: int = 1, top_groups: int = 1) -> set[int]:
    """The K best of the E scores of one token, only inside the best groups (a group: the sum of its two best).

    A score of -inf: this token may not choose that expert.
    """
    num_experts = len(score)
    size = num_experts // groups
    allowed = [e for e in range(num_experts) if score[e] > -math.inf]
    if groups > 1:
        worth = []
        for g in range(groups):
            members = sorted(score[g * size : (g + 1) * size], reverse=True)
            worth.append((sum(members[:2]), g))
        best = {g for _, g in sorted(worth, reverse=True)[:top_groups]}
        allowed = [e for e in allowed if e // size in best]
    return set(sorted(allowed, key=lambda e: score[e], reverse=True)[:top_k])


def naive_hidden(scores_TE: list[list[float]], logits_TE: Tensor) -> list[list[float]]:
    """The scores with -inf where the logit is -inf."""
    pairs = zip(scores_TE, logits_TE.tolist(), strict=True)
    return [[s if z > -math.inf else -math.inf for s, z in zip(*pair, strict=True)] for pair in pairs]


@dataclass
class Seen:
    """One router, one micro-batch (a layer that runs twice has two)."""

    logits_TE: Tensor  # with its graph
    gate: str
    top_k: int
    num_sequences: int
    mask_T: list[bool]
    documents_T: list[int] | None
    bias_E: list[float]
    groups: int
    top_groups: int
    ids: list[set[int]] = field(default_factory=list)
    plain_ids: list[set[int]] = field(default_factory=list)
    place: str = "scores"  # where the bias acts

    def __post_init__(self) -> None:
        scores = naive_scores(self.logits_TE.detach(), self.gate).tolist()
        chosen_by = naive_chosen_by(self.logits_TE.detach(), self.gate, self.bias_E, self.place)
        scores, chosen_by = (naive_hidden(one, self.logits_TE.detach()) for one in (scores, chosen_by))
        for row, biased in zip(scores, chosen_by, strict=True):
            self.ids.append(naive_select(biased, self.top_k, self.groups, self.top_groups))
            self.plain_ids.append(naive_select(row, self.top_k))

    @property
    def num_experts(self) -> int:
        return self.logits_TE.shape[1]

    @property
    def length(self) -> int:
        return self.logits_TE.shape[0] // self.num_sequences

    def tokens_of(self, sequences: range) -> list[int]:
        return [s * self.length + i for s in sequences for i in range(self.length)]

    def counts(self, tokens: list[int] | None = None, plain: bool = False) -> list[int]:
        total = [0] * self.num_experts
        for t in range(self.logits_TE.shape[0]) if tokens is None else tokens:
            if self.mask_T[t]:
                for e in (self.plain_ids if plain else self.ids)[t]:
                    total[e] += 1
        return total

    @property
    def num_valid(self) -> int:
        return sum(self.mask_T)


def fraction(counts: list) -> list[float]:
    total = sum(counts)
    return [c / total if total else 0.0 for c in counts]


def add(a: list, b: list) -> list:
    return [x + y for x, y in zip(a, b, strict=True)]


@dataclass
class History:
    """f of the steps before, one entry a layer."""

    steps: list[list[list[float]]] = field(default_factory=list)  # step -> layer -> f
    counts: list[list[list[int]]] = field(default_factory=list)  # step -> layer -> counts, where a caller keeps them
    ranks: int = 1

    def previous(self, layer: int) -> list[float] | None:
        return self.steps[-1][layer] if self.steps else None

    def ema(self, layer: int, decay: float) -> list[float] | None:
        """Weights (1 - d) d^age, normalised to sum to 1: written out over the whole past."""
        if not self.steps:
            return None
        weights = [decay ** (len(self.steps) - 1 - i) for i in range(len(self.steps))]
        total = sum(weights)
        size = len(self.steps[0][layer])
        return [sum(w / total * f[layer][e] for w, f in zip(weights, self.steps, strict=True)) for e in range(size)]


def estimated_fraction(
    step: list[list[Seen]], layer: int, m: int, estimator: str, decay: float, history: History
) -> list[float]:
    """f for micro-batch m of a layer; ``step[m]`` are the layers of micro-batch m."""
    size = step[0][layer].num_experts
    if estimator == "prefix":
        total = [0] * size
        for earlier in step[: m + 1]:
            total = add(total, earlier[layer].counts())
        return fraction(total)
    if estimator == "exact":
        total = [0] * size
        for any_micro in step:
            total = add(total, any_micro[layer].counts())
        return fraction(total)
    known = history.previous(layer) if estimator == "previous" else history.ema(layer, decay)
    return known or [0.0] * size


def fractions_per_token(
    step: list[list[Seen]], layer: int, m: int, policy: dict, history: History
) -> list[list[float]]:
    """f that each token of micro-batch m is balanced with: a list of T lists of E."""
    seen = step[m][layer]
    tokens, scope, plain = seen.logits_TE.shape[0], policy["scope"], policy.get("counts") == "unbiased"
    everything = list(range(tokens))
    if scope in ("micro_batch", "data_parallel"):
        return [fraction(seen.counts(everything, plain))] * tokens
    if scope == "sequence":
        per = [fraction(seen.counts(seen.tokens_of(range(s, s + 1)), plain)) for s in range(seen.num_sequences)]
        return [per[t // seen.length] for t in everything]
    if scope == "document":
        assert seen.documents_T is not None
        rows = []
        for t in everything:
            mates = [
                u for u in everything
                if u // seen.length == t // seen.length and seen.documents_T[u] == seen.documents_T[t]
            ]  # fmt: skip
            rows.append(fraction(seen.counts(mates, plain)))
        return rows
    if scope == "sequences":
        n = policy["n"]
        if n <= seen.num_sequences:  # neighbouring groups of n inside the micro-batch, the last may be smaller
            rows = []
            for t in everything:
                first = (t // seen.length) // n * n
                group = range(first, min(first + n, seen.num_sequences))
                rows.append(fraction(seen.counts(seen.tokens_of(group))))
            return rows
        window, length = [0] * seen.num_experts, 0  # runs over micro-batches; full: a new one starts
        for earlier in step[: m + 1]:
            if length >= n:
                window, length = [0] * seen.num_experts, 0
            window = add(window, earlier[layer].counts())
            length += earlier[layer].num_sequences
        return [fraction(window)] * tokens
    assert scope == "global_batch", scope
    f = estimated_fraction(step, layer, m, policy["estimator"], policy.get("decay", 0.9), history)
    return [f] * tokens


def naive_groups(policy: dict, size: int) -> tuple[list[list[int]], list[float]]:
    """(the experts of each group, the share of the load that each is to have)."""
    groups = policy.get("groups")
    if groups is None:
        groups = [[e] for e in range(size)]
    elif isinstance(groups, int):
        groups = [[e for e in range(size) if e * groups // size == g] for g in range(groups)]
    return groups, policy.get("targets") or [len(group) / size for group in groups]


def naive_view(f: list[float], policy: dict) -> list[float]:
    """w_e / E of design: cost times the group's load over its target, 1 in the mean where the load is on target."""
    if not any(policy.get(name) for name in ("groups", "costs", "targets")):
        return f
    size = len(f)
    groups, targets = naive_groups(policy, size)
    costs = policy.get("costs") or [1.0] * size
    w, on_target = [0.0] * size, 0.0
    for group, tau in zip(groups, targets, strict=True):
        load = 0.0
        for e in group:
            load += f[e]
        for e in group:
            w[e] = costs[e] * load / tau
            on_target += tau / len(group) * costs[e]
    return [x / on_target / size for x in w]


def token_values(seen: Seen, f_TE: list[list[float]]) -> Tensor:
    """E <f_t, p_t> for every valid token, with autograd to the logits; padding is left out."""
    probs_TE = naive_probs(seen.logits_TE, seen.gate)
    parts = []
    for t, f in enumerate(f_TE):
        if seen.mask_T[t]:
            parts.append(seen.num_experts * (torch.tensor(f, dtype=torch.float64) * probs_TE[t]).sum())
    return torch.stack(parts) if parts else seen.logits_TE.double().sum() * 0 + torch.zeros(0)


def z_values(seen: Seen) -> Tensor:
    z = seen.logits_TE.double()
    parts = [torch.log(torch.exp(z[t]).sum()) ** 2 for t in range(len(z)) if seen.mask_T[t]]
    return torch.stack(parts) if parts else z.sum() * 0 + torch.zeros(0)


def policy_token_values(step: list[list[Seen]], layer: int, m: int, policy: dict, history: History) -> Tensor:
    if policy["kind"] == "z":
        return z_values(step[m][layer])
    f_TE = fractions_per_token(step, layer, m, policy, history)
    return token_values(step[m][layer], [naive_view(f, policy) for f in f_TE])


@dataclass
class StepResult:
    """What one optimizer step must give: gradients by parameter name, counts and f per layer, values and norms."""

    gradients: dict[str, Tensor]
    counts: list[list[int]]
    seen: list[list[Seen]]
    values: list[float]  # per policy: mean over layers of the mean over tokens
    ratios: list[float]  # per policy: |its gradient at the logits| / |the language model's|


def watch_routers(model: nn.Module, seen: list[list[Seen]]) -> list[Any]:
    """Forward hooks on everything that routes; appends to the last list of ``seen``."""

    def hook(router: Any, args: tuple, routing: Any) -> None:
        batch = args[1] if len(args) > 1 else None
        tokens = routing.logits_TE.shape[0]
        mask = [True] * tokens if batch is None or batch.token_mask_T is None else batch.token_mask_T.tolist()
        documents = None if batch is None or batch.document_T is None else batch.document_T.tolist()
        bias = [0.0] * router.num_experts if router.expert_bias is None else router.expert_bias.double().tolist()
        number = 1 if batch is None else batch.num_sequences
        one = Seen(
            routing.logits_TE, router.gate, router.top_k, number, mask, documents, bias,
            router.num_groups, router.top_groups, place=router.bias_place,
        )  # fmt: skip
        for t, chosen in enumerate(routing.expert_ids_TK.tolist()):
            none = {router.num_experts}  # for a token that may choose fewer than K
            assert set(chosen) - none == one.ids[t], "the router chose other experts than the loops"
        assert routing.counts_E.tolist() == one.counts()
        seen[-1].append(one)

    return [m.register_forward_hook(hook) for m in model.modules() if hasattr(m, "expert_bias") and hasattr(m, "top_k")]


def reference_step(
    model: nn.Module,
    micro_batches: list[Any],
    loss_of: Any,
    policies: list[dict],
    history: History,
    *,
    weights: list[float] | None = None,
    scales: list[float] | None = None,
) -> StepResult:
    """One step of a model that has no balancer: language-model losses plus the policies' losses, by plain autograd.

    Args:
        scales: what the engine multiplies each micro-batch's loss with (default 1/M).
        weights: what each micro-batch's *token* of a balance loss is multiplied with; default scale / valid tokens.
    """
    seen: list[list[Seen]] = []
    hooks = watch_routers(model, seen)
    count = len(micro_batches)
    scales = scales or [1 / count] * count
    language = []
    for batch, scale in zip(micro_batches, scales, strict=True):
        seen.append([])
        language.append(scale * loss_of(model, batch))
    for hook in hooks:
        hook.remove()
    layers = len(seen[0])
    weights = weights or [s / max(row[0].num_valid, 1) for s, row in zip(scales, seen, strict=True)]
    total = torch.stack([loss.double() for loss in language]).sum()
    values, squares = [], []
    logits = [one.logits_TE for row in seen for one in row]
    at_logits = _norm_square(total, logits)
    for policy in policies:
        per_layer, square = [], 0.0
        for layer in range(layers):
            tokens = [policy_token_values(seen, layer, m, policy, history) for m in range(count)]
            pushed = torch.stack([w * v.sum() for w, v in zip(weights, tokens, strict=True)]).sum() * policy["coef"]
            square += _norm_square(pushed, [row[layer].logits_TE for row in seen])
            per_layer.append(float(torch.cat(tokens).detach().mean()) if sum(len(v) for v in tokens) else 0.0)
            total = total + pushed
        values.append(sum(per_layer) / layers)
        squares.append(square)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    grads = torch.autograd.grad(total, parameters, allow_unused=True)
    counts = [[0] * seen[0][layer].num_experts for layer in range(layers)]
    for row in seen:
        counts = [add(c, one.counts()) for c, one in zip(counts, row, strict=True)]
    history.steps.append([fraction(c) for c in counts])
    return StepResult(
        {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, grads, strict=True)},
        counts, seen, values, [math.sqrt(s / at_logits) if at_logits else math.inf for s in squares],
    )  # fmt: skip


def _norm_square(scalar: Tensor, at: list[Tensor]) -> float:
    grads = torch.autograd.grad(scalar, at, retain_graph=True, allow_unused=True)
    return sum(float(g.double().square().sum()) for g in grads if g is not None)


def naive_maxvio(counts: list) -> float:
    return max(counts) / (sum(counts) / len(counts)) - 1 if sum(counts) else 0.0


def naive_violation(counts: list[int], view: dict | None = None) -> list[float]:
    """1 - load / target of the group of each expert; each expert is one, and its target 1/E, without a view."""
    groups, targets = naive_groups(view or {}, len(counts))
    found, total = [0.0] * len(counts), sum(counts)
    for group, tau in zip(groups, targets, strict=True):
        load = sum(counts[e] for e in group)
        for e in group:
            found[e] = (tau * total - load) / (tau * total) if total else 0.0
    return found


def naive_rule(counts: list[int], rule: str, view: dict | None = None) -> list[float]:
    """The step of a rule without memory, for a rate of 1."""
    v = naive_violation(counts, view)
    if rule == "sign":
        return [float((x > 0) - (x < 0)) for x in v]
    if rule == "rms":
        rms = math.sqrt(sum(x * x for x in v) / len(v))
        return [x / rms if rms else 0.0 for x in v]
    assert rule == "proportional", rule
    return v


def naive_micro_batch_bias_step(
    bias: list[float], micro_batches: list[list[int]], rule: str, rate: float
) -> list[float]:
    """The control: the rule asked of the counts of each micro-batch that has any, and averaged."""
    moves = [naive_rule(counts, rule) for counts in micro_batches if sum(counts)]
    moved = [b + rate * sum(move[e] for move in moves) / max(len(moves), 1) for e, b in enumerate(bias)]
    middle = sum(moved) / len(moved)
    return [b - middle for b in moved]


def naive_bias_step(
    bias: list[float],
    counts: list[int],
    rule: str,
    rate: float,
    momentum: list[float],
    kappa: float = 2.0,
    beta: float = 0.5,
    view: dict | None = None,
) -> tuple[list[float], list[float]]:
    """Loss-free update by loops: returns (bias, momentum)."""
    size = len(counts)
    if rule == "momentum":
        bent = [math.tanh(kappa * x) for x in naive_violation(counts, view)]
        middle = sum(bent) / size
        momentum = [beta * m + (1 - beta) * (b - middle) for m, b in zip(momentum, bent, strict=True)]
        move = momentum
    else:
        move = naive_rule(counts, rule, view)
    moved = [b + rate * d for b, d in zip(bias, move, strict=True)]
    middle = sum(moved) / size
    return [b - middle for b in moved], momentum
