"""Holds what the ranks of a case report against the float64 reference of the same sequences."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from contracts.invariance._case import (
    COEF,
    MODELS,
    SEQUENCES,
    TOP_P,
    WIDTHS,
    Case,
    Data,
    assign,
    make_data,
    places_of,
    policies_of,
)
from contracts.invariance._reference import Architecture, Expected, Token, reference, select_all
from contracts.law._reference import History

# Relative to the largest entry of each parameter's gradient. fp32: rounding of forward and backward, measured at most
# some 1e-6. bf16: each rounding to 8 bits is up to 4e-3, and activations, gradients and their sums over micro-batches
# and ranks are rounded one after the other (measured: up to 0.074); that a balance gradient which is missing or doubled
# is far above it is asserted case by case. Counts, biases and choices are exact in both.
TOLERANCE = {"fp32": 1e-5, "bf16": 0.1}


class Table(NamedTuple):
    """All tokens of a step with what the engine makes them weigh."""

    tokens: list[Token]
    language_weights: list[float]
    token_weights: list[float]
    rows: dict[tuple[int, int], int]


def tokens_of(case: Case, data: Data, step: int, sequences: int = SEQUENCES) -> Table:
    """Means are divided by their own tokens, by the micro-batches and by the ranks; sums by the step's tokens."""
    cut = assign(case, step, sequences)
    tokens = []
    rows = {(rank, micro): len(numbers) for rank, parts in enumerate(cut) for micro, numbers in enumerate(parts)}
    for rank, parts in enumerate(cut):
        for micro, numbers in enumerate(parts):
            for shard in range(case.shards):
                for row, n in enumerate(numbers):
                    for place in places_of(case, shard):
                        document = 0 if data.documents_NS is None else int(data.documents_NS[n, place])
                        tokens.append(
                            Token(
                                n, place, rank, shard, micro, row,
                                bool(data.valid_NS[n, place]), bool(data.label_NS[n, place]), document,
                            )
                        )  # fmt: skip
    valid, labels = sum(t.valid for t in tokens), sum(t.label for t in tokens)
    mine = {key: [0, 0] for key in [(t.rank, t.shard, t.micro) for t in tokens]}
    for t in tokens:
        mine[t.rank, t.shard, t.micro][0] += t.valid
        mine[t.rank, t.shard, t.micro][1] += t.label
    parts_of_step = case.ranks * case.micro
    counted = case.micro > 1 and any(p.get("estimator") == "exact" for p in policies_of(case))
    language, balance = [], []
    for t in tokens:
        my_valid, my_labels = mine[t.rank, t.shard, t.micro]
        by_mean = 1 / (parts_of_step * max(my_labels, 1))
        language.append((1 / labels if case.loss == "sum" else by_mean) * t.label)
        by_step = case.declares or counted  # a counting pass knows the step's tokens too
        balance.append(1 / valid if by_step else 1 / (parts_of_step * max(my_valid, 1)))
    return Table(tokens, language, balance, rows)


def judge(case: Case, ranks: list[list[Any]], sequences: int = SEQUENCES) -> list[Expected]:
    """Raises AssertionError where a step of a case is not the reference's; returns what the reference says."""
    history, policies, found = History(ranks=case.ranks), policies_of(case), []
    for number, step in enumerate(ranks[0]):
        data = make_data(case, number, sequences)
        table = tokens_of(case, data, number, sequences)
        flat = torch.tensor([[t.sequence, t.place] for t in table.tokens])
        x_TD, target_TD = (f[flat[:, 0], flat[:, 1]] for f in (data.x_NSD, data.target_NSD))
        expected = reference(
            step.weights, architecture_of(case), table.tokens, x_TD, target_TD, policies, history,
            language_weights=table.language_weights, token_weights=table.token_weights, rows=table.rows,
            routed=_routed(case, step.weights, table.tokens, [steps[number].routed for steps in ranks]),
        )  # fmt: skip
        found.append(expected)
        for rank, steps in enumerate(ranks):
            _same_state(f"step {number}, rank {rank}", steps[number], expected)
        _same_gradients(case, number, step.gradients, expected)
    if any(p["kind"] == "aux" and p["coef"] == COEF for p in policies):  # the policy is there to be seen
        seen = [_share_of_balance(step.gradients, expected) for step, expected in zip(ranks[0], found, strict=True)]
        assert max(seen) > 2 * TOLERANCE[case.precision], f"this case could not fail: shares of balance {seen}"
    return found


def architecture_of(case: Case) -> Architecture:
    sizes, order, gate = MODELS[case.model]
    widths = WIDTHS.get(case.model, [[8] * experts for experts, _ in sizes])
    return Architecture(sizes, order, gate, widths, TOP_P.get(case.model))


def _same_state(where: str, step: Any, expected: Expected) -> None:
    assert step.counts == expected.counts, f"{where}: counts"
    for got_E, bias in zip(step.biases, expected.biases, strict=True):
        assert got_E.dtype == torch.float32
        truth_E = torch.tensor(bias, dtype=torch.float64).float()  # 1e-12: a centred 0 may be 1e-19
        assert (got_E - truth_E).abs().max() < 1e-12, f"{where}: bias"
    got = {key: step.metrics[key] for key in expected.losses}
    assert got == pytest.approx(expected.losses, rel=1e-2 if _is_rounded(step) else 1e-5, abs=1e-9), where


def _is_rounded(step: Any) -> bool:
    return bool(step.routed)


def _same_gradients(case: Case, number: int, got: dict[str, Tensor], expected: Expected) -> None:
    assert set(got) == {n for n in expected.gradients if not n.startswith("blocks.2.")}  # blocks.2 is blocks.1 again
    for name, gradient in got.items():
        truth = expected.gradients[name]
        error, size = (gradient.double() - truth).abs().max().item(), truth.abs().max().item()
        limit = TOLERANCE[case.precision] * max(size, 1e-12)
        assert error <= limit, f"step {number}, {name}: error {error / max(size, 1e-12):.3g} of {size:.3g}"


def _share_of_balance(got: dict[str, Tensor], expected: Expected) -> float:
    """Of the largest entry of the gradients of router weights; of the layer where it is largest."""
    names = [n for n in got if n.endswith("gate.weight")]
    whole, language = expected.gradients, expected.language
    return max(((whole[n] - language[n]).abs().max() / whole[n].abs().max()).item() for n in names)


def _routed(case: Case, weights: dict, tokens: list[Token], ranks: list[Any]) -> list[tuple] | None:
    """For each call the experts of each token in the reference's order, with and without bias, as bf16 made them.

    The routers compute in fp32 from tokens in bf16. What the run reports is checked against its own logits here.
    """
    if case.precision != "bf16":
        return None
    sizes, order, gate = MODELS[case.model]
    width, found = len(places_of(case, 0)), []
    for call, layer in enumerate(order):
        bias = weights.get(f"blocks.{layer}.gate.expert_bias")
        at: dict[tuple, tuple[set[int], set[int]]] = {}
        for rank, micros in enumerate(ranks):
            for micro, per_call in enumerate(micros):
                logits_TE, ids = per_call[call]
                bias_E = [0.0] * sizes[layer][0] if bias is None else bias.tolist()
                experts, top_k = sizes[layer]
                chosen, plain = select_all(logits_TE, bias_E, top_k, gate, TOP_P.get(case.model))
                assert chosen == [set(one) - {experts} for one in ids], "the router chose other experts than the loops"
                for t, both in enumerate(zip(chosen, plain, strict=True)):
                    place = places_of(case, rank % case.shards)[t % width]
                    at[rank // case.shards, micro, t // width, place] = both
        mine = [at[t.rank, t.micro, t.row, t.place] for t in tokens]
        found.append(([chosen for chosen, _ in mine], [plain for _, plain in mine]))
    return found
