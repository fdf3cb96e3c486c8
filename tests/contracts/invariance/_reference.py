"""The second opinion on a step over all ranks: loops over tokens and plain autograd in float64, in one process.

It imports nothing from equipoise and knows every token of every rank, micro-batch and shard. A load fraction f is made
for each token from its *mates*: the tokens that share a key with it (its sequence, its micro-step, ...), wherever they
are. The model itself is written out too, so that only weights are taken from the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contracts.law._reference import (
    History,
    fraction,
    naive_bias_step,
    naive_hidden,
    naive_maxvio,
    naive_micro_batch_bias_step,
    naive_probs,
    naive_scores,
    naive_select,
    naive_view,
)

__all__ = ["Architecture", "Expected", "Token", "reference", "select_all"]


class Architecture(NamedTuple):
    sizes: list[tuple[int, int]]  # (E, K) of each layer
    order: list[int]  # in which the layers are called
    gate: str
    widths: list[list[int]]  # of the experts of each layer
    top_p: float | None  # None: K experts for every token, whose weights sum to 1


class Token(NamedTuple):
    """Where one token is. ``row`` is the place of its sequence in the micro-batch of its rank."""

    sequence: int
    place: int
    rank: int  # among the data ranks: shards of one sequence have the same
    shard: int
    micro: int
    row: int
    valid: bool
    label: bool
    document: int


class Call(NamedTuple):
    """One call of one layer, over all tokens of the step."""

    layer: int
    probs_TE: Tensor  # float64, with its graph
    logits_TE: Tensor
    chosen: list[set[int]]
    plain: list[set[int]]  # without the selection bias


class Expected(NamedTuple):
    gradients: dict[str, Tensor]
    counts: list[list[int]]
    biases: list[list[float] | None]
    losses: dict[str, float]  # metric name -> value
    language: dict[str, Tensor]  # the gradients without the policies


def reference(
    weights: dict[str, Tensor],
    architecture: Architecture,
    tokens: Sequence[Token],
    x_TD: Tensor,
    target_TD: Tensor,
    policies: list[dict],
    history: History,
    *,
    language_weights: list[float],
    token_weights: list[float],
    rows: dict[tuple[int, int], int],
    routed: list[tuple[list[set[int]], list[set[int]]]] | None = None,
) -> Expected:
    """One step; adds its loads to ``history``.

    Args:
        weights: of the model at the start of the step, biases among them.
        language_weights: what the squared error of each token is multiplied by in the step's loss.
        token_weights: the same for the balance losses, for a layer that runs once per micro-batch.
        rows: (data rank, micro-batch) -> sequences in it, also where it has none.
        routed: for each call the experts of each token, with and without bias, where bf16 has rounded its way to them.
    """
    leaves = {n: w.double().requires_grad_("expert" not in n.rpartition(".")[2]) for n, w in weights.items()}
    y_TD, calls = _forward(leaves, architecture, x_TD.double(), routed)
    error_T = (y_TD - target_TD.double()).square().mean(dim=1)
    language = (error_T * torch.tensor(language_weights, dtype=torch.float64)).sum()
    total, losses = language, {}
    valid_T = torch.tensor([float(t.valid) for t in tokens], dtype=torch.float64)
    weight_T = torch.tensor(token_weights, dtype=torch.float64)
    layers = len(architecture.sizes)
    for number, policy in enumerate(policies):
        if policy["kind"] == "bias":
            continue
        per_layer = []
        for layer in range(layers):
            mine = [call for call in calls if call.layer == layer]
            value = 0.0
            seen = policy | ({"costs": architecture.widths[layer]} if policy.get("costs") == "width" else {})
            for call in mine:
                value_T = _values(seen, call, mine, tokens, rows, history) * valid_T
                total = total + policy["coef"] / len(mine) * (weight_T * value_T).sum()
                value += value_T.sum().item() / len(mine)
            per_layer.append(value / max(valid_T.sum().item(), 1))
        losses[f"balance/policy_{number}/loss"] = sum(per_layer) / layers
    counts = [_counts([c for c in calls if c.layer == layer], tokens, lambda _: True) for layer in range(layers)]
    biases = [
        _moved(policies, leaves.get(f"blocks.{layer}.gate.expert_bias"), [c for c in calls if c.layer == layer], tokens)
        for layer in range(layers)
    ]
    history.steps.append([fraction(c) for c in counts])
    history.counts.append(counts)
    losses |= _loads(calls, tokens, counts)
    return Expected(_gradients(total, leaves), counts, biases, losses, _gradients(language, leaves))


def _gradients(total: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    wanted = {n: leaf for n, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(total, list(wanted.values()), allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(wanted.items(), grads, strict=True)}


def _forward(
    weights: dict[str, Tensor], architecture: Architecture, x_TD: Tensor, routed: list[tuple] | None
) -> tuple[Tensor, list[Call]]:
    """A linear layer, then residual MoE layers: router, weights of the chosen, SwiGLU experts."""
    sizes, order, gate, widths, top_p = architecture
    h_TD = x_TD @ weights["inp.weight"].T + weights["inp.bias"]
    calls = []
    for number, layer in enumerate(order):
        num_experts, top_k = sizes[layer]
        at = f"blocks.{layer}."
        logits_TE = h_TD @ weights[at + "gate.weight"].T
        if (visible := weights.get(at + "gate.visible_experts")) is not None:
            rows = [visible[int(abs(int(4 * x[0])) % len(visible))].tolist() for x in x_TD]
            logits_TE = logits_TE.masked_fill(torch.tensor(rows) == 0, float("-inf"))
        bias = weights.get(at + "gate.expert_bias")
        bias_E = [0.0] * num_experts if bias is None else bias.tolist()
        picked, plain = routed[number] if routed is not None else select_all(logits_TE, bias_E, top_k, gate, top_p)
        calls.append(Call(layer, naive_probs(logits_TE, gate), logits_TE, picked, plain))
        scores_TE = naive_scores(logits_TE, gate)
        is_chosen_TE = torch.tensor([[float(e in ids) for e in range(num_experts)] for ids in picked]).double()
        mix_TE = scores_TE * is_chosen_TE
        if top_p is None:
            mix_TE = mix_TE / mix_TE.sum(dim=1, keepdim=True)
        out_TD = torch.zeros_like(h_TD)
        for e in range(num_experts):
            gate_FD, up_FD, down_DF = _expert(weights, at + "experts.", e, widths[layer])
            a, b = h_TD @ gate_FD.T, h_TD @ up_FD.T
            y = (a / (1 + torch.exp(-a)) * b) @ down_DF.T
            out_TD = out_TD + mix_TE[:, e : e + 1] * y
        h_TD = h_TD + out_TD
    return h_TD, calls


def _expert(weights: dict[str, Tensor], at: str, e: int, widths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up and down of one expert; those of unlike widths lie one after the other, down transposed."""
    both, down = weights[at + "gate_up_proj"], weights[at + "down_proj"]
    if both.dim() == 3:
        return *both[e].chunk(2, dim=0), down[e]
    start, width = sum(widths[:e]), widths[e]
    first = 2 * start
    return both[first : first + width], both[first + width : first + 2 * width], down[start : start + width].T


def select_all(
    logits_TE: Tensor, bias_E: list[float], top_k: int, gate: str, top_p: float | None = None
) -> tuple[list[set[int]], list[set[int]]]:
    """(experts of each token, as many without the selection bias)."""
    rows = naive_hidden(naive_scores(logits_TE.detach(), gate).tolist(), logits_TE.detach())
    biased = [[s + b for s, b in zip(row, bias_E, strict=True)] for row in rows]
    chosen = [naive_select(row, top_k) for row in biased]
    if top_p is not None:
        probs = naive_probs(logits_TE.detach(), gate).tolist()
        chosen = [_fewest(c, b, p, top_p) for c, b, p in zip(chosen, biased, probs, strict=True)]
    return chosen, [naive_select(row, len(c)) for row, c in zip(rows, chosen, strict=True)]


def _fewest(chosen: set[int], biased: list[float], probs: list[float], top_p: float) -> set[int]:
    """The best of these, one after the other, until they have this much probability."""
    kept: set[int] = set()
    for e in sorted(chosen, key=lambda e: -biased[e]):
        if sum(probs[other] for other in kept) < top_p:
            kept.add(e)
    return kept


def _counts(
    calls: list[Call], tokens: Sequence[Token], which: Callable[[Token], bool], plain: bool = False
) -> list[int]:
    total = [0] * calls[0].probs_TE.shape[1]
    for call in calls:
        for t, token in enumerate(tokens):
            if token.valid and which(token):
                for e in (call.plain if plain else call.chosen)[t]:
                    total[e] += 1
    return total


def _values(
    policy: dict, call: Call, calls: list[Call], tokens: Sequence[Token], rows: dict, history: History
) -> Tensor:
    """E <f_t, p_t> of every token, its entropy, or the z-loss's squared logsumexp."""
    if policy["kind"] == "entropy":
        logs_TE = torch.log(call.probs_TE.clamp(min=1e-300))  # an expert that is masked has 0, and p ln p is 0 there
        return -(call.probs_TE * logs_TE).sum(dim=1)
    if policy["kind"] == "z":
        return torch.log(torch.exp(call.logits_TE).sum(dim=1)) ** 2
    key, make = _fraction_by_key(policy, call, calls, tokens, rows, history)
    known: dict[Hashable, list[float]] = {}
    f_TE = []
    for token in tokens:
        k = key(token)
        if k not in known:
            known[k] = naive_view(make(k), policy)
        f_TE.append(known[k])
    return call.probs_TE.shape[1] * (torch.tensor(f_TE, dtype=torch.float64) * call.probs_TE).sum(dim=1)


def _fraction_by_key(
    policy: dict, call: Call, calls: list[Call], tokens: Sequence[Token], rows: dict, history: History
) -> tuple[Callable[[Token], Any], Callable[[Any], list[float]]]:
    """(key of a token, f of a key). Scopes inside a micro-batch are measured per call, wider ones over all calls."""
    scope, plain = policy["scope"], policy.get("counts") == "unbiased"

    def mates(key: Callable[[Token], Any]) -> tuple:
        return key, lambda k: fraction(_counts([call], tokens, lambda u: key(u) == k, plain))

    match scope:
        case "sequence":
            return mates(lambda t: t.sequence)
        case "document":
            return mates(lambda t: (t.sequence, t.document))
        case "micro_batch":
            return mates(lambda t: (t.rank, t.micro))
        case "data_parallel":
            return lambda t: t.micro, lambda m: fraction(_counts(calls, tokens, lambda u: u.micro == m))
        case "global_batch":
            return lambda t: t.micro, lambda m: _estimated(policy, calls, tokens, m, history)
        case "sequences":
            n = policy["n"]

            def key(t: Token) -> tuple:
                inside = n <= rows[t.rank, t.micro]
                return (t.rank, t.micro, t.row // n if inside else None)

            def make(k: tuple) -> list[float]:
                rank, micro, group = k
                if group is None:
                    return fraction(_window(n, calls, tokens, rank, micro, rows))
                return fraction(_counts([call], tokens, lambda u: key(u) == k))

            return key, make
    raise AssertionError(scope)


def _window(n: int, calls: list[Call], tokens: Sequence[Token], rank: int, micro: int, rows: dict) -> list[int]:
    """A window over this rank's micro-batches so far; once it has n sequences, the next one starts anew."""
    first, length = 0, 0
    for m in range(micro + 1):
        if length >= n:
            first, length = m, 0
        length += rows[rank, m]
    return _counts(calls, tokens, lambda u: u.rank == rank and first <= u.micro <= micro)


def _estimated(policy: dict, calls: list[Call], tokens: Sequence[Token], micro: int, history: History) -> list[float]:
    layer, size = calls[0].layer, calls[0].probs_TE.shape[1]
    so_far = _counts(calls, tokens, lambda u: u.micro <= micro)
    before = history.counts[-1][layer] if history.counts else None
    match policy["estimator"]:
        case "prefix":
            return fraction(so_far)
        case "exact":
            return fraction(_counts(calls, tokens, lambda _: True))
        case "previous":
            return history.previous(layer) or [0.0] * size
        case "ema":
            return history.ema(layer, policy["decay"]) or [0.0] * size
        case "filled":
            if history.ranks > 1:  # they share what has come at the first, second, fourth, ... micro-step
                told = max(m for m in range(micro + 1) if (m + 1).bit_count() == 1)
                so_far = _counts(calls, tokens, lambda u: u.micro <= told)
            if before is None:
                return fraction(so_far)
            missing = max(sum(before) - sum(so_far), 0)
            return fraction([c + missing * b / sum(before) for c, b in zip(so_far, before, strict=True)])
    raise AssertionError(policy)


def _moved(
    policies: list[dict], bias_E: Tensor | None, calls: list[Call], tokens: Sequence[Token]
) -> list[float] | None:
    """By the load of the step, or by that of each micro-batch: each call of the layer in it, over all its shards."""
    if bias_E is None:
        return None
    bias = bias_E.tolist()
    for policy in policies:
        if policy["kind"] == "bias" and policy.get("scope") == "micro_batch":
            where = sorted({(t.rank, t.micro) for t in tokens})
            parts = [
                _counts([call], tokens, lambda t, at=at: (t.rank, t.micro) == at) for call in calls for at in where
            ]
            bias = naive_micro_batch_bias_step(bias, parts, policy["rule"], policy["rate"])
        elif policy["kind"] == "bias":
            counts = _counts(calls, tokens, lambda _: True)
            bias, _ = naive_bias_step(bias, counts, policy["rule"], policy["rate"], [])
    return bias


def _loads(calls: list[Call], tokens: Sequence[Token], counts: list[list[int]]) -> dict[str, float]:
    """MaxVio of the step and, on average over sequences with a valid token, of a sequence; mean over layers."""
    per_layer = []
    for layer in range(len(counts)):
        violations = []
        for call in [c for c in calls if c.layer == layer]:
            of_sequence: dict[int, Counter] = {}
            for t, token in enumerate(tokens):
                if token.valid:
                    of_sequence.setdefault(token.sequence, Counter()).update(call.chosen[t])
            size = call.probs_TE.shape[1]
            violations += [naive_maxvio([c[e] for e in range(size)]) for c in of_sequence.values()]
        per_layer.append(sum(violations) / max(len(violations), 1))
    return {
        "balance/maxvio_global": sum(naive_maxvio(c) for c in counts) / len(counts),
        "balance/maxvio_sequence": sum(per_layer) / len(per_layer),
        "balance/tokens": float(sum(token.valid for token in tokens)),
    }
