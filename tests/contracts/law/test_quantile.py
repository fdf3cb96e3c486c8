"""The quantile rule: biases against exact quantiles over all tokens of a step, however it is cut; the control."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contracts.law._model import Micro, cut, make_step, net, train_step
from contracts.law._reference import naive_chosen_by, naive_scores, naive_select, watch_routers
from equipoise import AuxLoss, Balancer, ConfigError, ExpertBias
from equipoise.functional.metrics import maxvio
from equipoise.functional.quantile import bin_width

SMALL: dict[str, Any] = {"experts": (6,), "top_k": (2,), "gate": "sigmoid"}


def offsets(seen: Any, place: str) -> list[list[float]]:
    """By loops over tokens: alpha_t - (score + bias), infinity for an expert outside the groups of a token."""
    by = naive_chosen_by(seen.logits_TE.detach(), seen.gate, seen.bias_E, place)
    if place == "logits":
        by = (seen.logits_TE.detach().double() + torch.tensor(seen.bias_E)).tolist()
    scores = naive_chosen_by(seen.logits_TE.detach(), seen.gate, seen.bias_E, place)
    size, rows = seen.num_experts // seen.groups, []
    for t, row in enumerate(by):
        allowed = list(range(len(row)))
        if seen.groups > 1:
            worth = [sum(sorted(scores[t][g * size : (g + 1) * size])[-2:]) for g in range(seen.groups)]
            best = sorted(range(seen.groups), key=lambda g: worth[g])[-seen.top_groups :]
            allowed = [e for e in allowed if e // size in best]
        left = [row[e] for e in allowed if e not in seen.ids[t]]
        alpha = max(left) if left else -math.inf
        rows.append([alpha - row[e] if e in allowed else math.inf for e in range(len(row))])
    return [row for row, real in zip(rows, seen.mask_T, strict=True) if real]


def around(values: list[float], share: float) -> tuple[float, float]:
    """The two ordered values between which a share of them lies below."""
    ordered, n = sorted(values), share * len(values)
    low = ordered[max(math.ceil(n - 1e-9) - 1, 0)]
    return low, ordered[min(math.floor(n + 1e-9), len(ordered) - 1)]


def expected_bias(seen: list[Any], place: str, targets: list[float] | None = None) -> list[tuple[float, float]]:
    """For each expert the range that its bias has to lie in, before the mean is taken off."""
    first = seen[0]
    rows = [row for one in seen for row in offsets(one, place)]
    targets = targets or [1 / first.num_experts] * first.num_experts
    found = []
    for e, (bias, tau) in enumerate(zip(first.bias_E, targets, strict=True)):
        low, high = (min(max(x, -64.0), 64.0) for x in around([row[e] for row in rows], tau * first.top_k))
        found.append((bias + low - bin_width(low), bias + high + bin_width(high)))
    return found


def check(bias_E: Tensor, ranges: list[tuple[float, float]]) -> None:
    """Some constant, the mean that was taken off, brings every bias into its range."""
    least = max(low - b for (low, _), b in zip(ranges, bias_E.tolist(), strict=True))
    most = min(high - b for (_, high), b in zip(ranges, bias_E.tolist(), strict=True))
    assert least <= most + 1e-6
    assert abs(float(bias_E.mean())) < 1e-6


@pytest.mark.parametrize("gate", ["sigmoid", "softmax", "sqrt_softplus"])
@pytest.mark.parametrize("place", ["scores", "logits"])
@pytest.mark.parametrize("groups", [(1, 1), (3, 2)])
@pytest.mark.parametrize("targets", [None, [0.3, 0.1, 0.1, 0.1, 0.2, 0.2]])
def test_every_bias_is_the_quantile_of_all_tokens_of_the_step(gate, place, groups, targets):
    """Three steps of three micro-batches with padding: each bias moves from where the last step left it."""
    chosen = {"gate": gate, "num_groups": groups[0], "top_groups": groups[1]}
    model = net(experts=(6,), top_k=(2,), dtype=torch.float64, **chosen)
    balancer = Balancer(model, [ExpertBias("quantile", place=place, targets=targets)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    seen: list[list[Any]] = [[]]
    watch_routers(model, seen)
    for step in range(3):
        seen[:] = [[]]
        train_step(model, balancer, optimizer, make_step(step, 3, 3, 7, masked=True, dtype=torch.float64))
        check(model.blocks[0].gate.expert_bias, expected_bias(seen[0], place, targets))


def test_the_loops_choose_as_the_router_does():
    """Who is below 0 is chosen: the offsets of the reference and the choice are one thing."""
    logits = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    scores = naive_scores(logits, "sigmoid").tolist()
    for row in scores:
        chosen = naive_select(row, 2)
        alpha = max(s for e, s in enumerate(row) if e not in chosen)
        assert {e for e, s in enumerate(row) if alpha - s < 0} == chosen


@settings(max_examples=10, deadline=None)
@given(micro=st.sampled_from([1, 2, 3, 6]), masked=st.booleans(), seed=st.integers(0, 99))
def test_any_cut_of_the_step_gives_the_same_bits(micro, masked, seed):
    """Counts are whole numbers: no order of sums changes them."""
    found = []
    for number in (1, micro):
        model = net(**SMALL, dtype=torch.float64)
        balancer = Balancer(model, [ExpertBias("quantile")])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        step = cut(make_step(seed, 1, 6, 5, masked=masked, dtype=torch.float64), number)
        for batch in step:
            (balancer.tap(model(batch.x_BSD, batch.mask_BS).square().mean()) / number).backward()
        optimizer.step()
        found.append(model.blocks[0].gate.expert_bias.clone())
    assert found[0].any() and torch.equal(*found)


@pytest.mark.parametrize("mode", ["reentrant", "non_reentrant", "selective"])
def test_a_recompute_counts_once(mode):
    found = []
    for how in ("plain", mode):
        model = net(**SMALL, mode=how)
        balancer = Balancer(model, [ExpertBias("quantile"), AuxLoss("micro_batch", 0.1)])
        train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.05), make_step(0))
        found.append(model.blocks[0].gate.expert_bias.clone())
    assert found[0].any() and torch.equal(*found)


def test_the_next_step_of_the_same_tokens_is_balanced():
    """What the rule promises: thresholds of the others held, each expert gets its share; sign takes many steps."""
    torch.manual_seed(0)
    x, found = torch.randn(1, 2048, 8) + 1.0, {}
    for rule, rate in (("quantile", None), ("sign", 1e-2)):
        model = net(experts=(8,), top_k=(2,), gate="sigmoid")
        balancer = Balancer(model, [ExpertBias(rule, rate=rate)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        found[rule] = []
        for _ in range(8):
            balancer.tap(model(x).square().mean()).backward()
            optimizer.step()
            found[rule].append(float(maxvio(balancer.load()[0])))
    assert found["quantile"][0] == found["sign"][0] > 0.5
    assert found["quantile"][7] < 0.05 < found["sign"][7]


def test_the_quantile_is_of_the_k_of_its_call():
    """A schedule or a run that goes on with another K changes it while one trains."""
    found = []
    for built in (2, 4):
        model = net(experts=(8,), top_k=(built,), gate="sigmoid")
        balancer = Balancer(model, [ExpertBias("quantile", scope="micro_batch")])
        model.blocks[0].gate.top_k = 4
        train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.0), make_step(0, 2, 2, 7))
        found.append(model.blocks[0].gate.expert_bias.clone())
    assert torch.equal(*found) and found[0].any()


def test_the_mean_of_micro_batch_quantiles_is_the_control():
    """Megatron-core's and Marin's: exact quantiles of each micro-batch, averaged; not those of the step."""
    found = []
    for scope in ("micro_batch", "global_batch"):
        model = net(**SMALL, dtype=torch.float64)
        balancer = Balancer(model, [ExpertBias("quantile", scope=scope)])
        seen: list[list[Any]] = [[]]
        watch_routers(model, seen)
        step = make_step(0, 3, 2, 7, masked=True, dtype=torch.float64)
        train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.0), step)
        found.append(model.blocks[0].gate.expert_bias.clone())
        if scope == "micro_batch":
            means = [0.0] * 6
            for one in seen[0]:
                rows = offsets(one, "scores")
                for e in range(6):
                    low, high = around([row[e] for row in rows], 1 / 3)
                    means[e] += (low + high) / 2 / len(seen[0])
            assert found[0].tolist() == pytest.approx([m - sum(means) / 6 for m in means], abs=1e-6)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_huge_logits_and_empty_steps_leave_it_finite():
    model = net(**SMALL)
    balancer = Balancer(model, [ExpertBias("quantile", place="logits")])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model.blocks[0].gate.weight.data *= 1e6
    train_step(model, balancer, optimizer, make_step(0))
    bias = model.blocks[0].gate.expert_bias.clone()
    assert bias.isfinite().all() and bias.abs().max() <= 128
    (empty,) = make_step(0, 1)
    none = Micro(empty.x_BSD, empty.target_BSD, torch.zeros_like(empty.x_BSD[..., 0], dtype=torch.bool))
    balancer.tap(model(none.x_BSD, none.mask_BS).sum() * 0.0).backward()
    optimizer.step()
    torch.testing.assert_close(model.blocks[0].gate.expert_bias, bias, rtol=1e-6, atol=0)


def test_half_the_way_and_not_at_all():
    found = {}
    for rate in (1.0, 0.5, 0.0):
        model = net(**SMALL, dtype=torch.float64)
        balancer = Balancer(model, [ExpertBias("quantile", rate=rate)])
        train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.0), make_step(0, dtype=torch.float64))
        found[rate] = model.blocks[0].gate.expert_bias.clone()
    assert torch.allclose(found[0.5], found[1.0] / 2, atol=1e-7) and not found[0.0].any()
    assert ExpertBias("quantile").rate == 1.0 and ExpertBias().rate == 1e-3


@pytest.mark.parametrize(
    ("options", "said"),
    [({"rate": 2.0}, "at most 1"), ({"place": "multiply"}, "bias that is added"), ({"groups": 2}, "themselves")],
)
def test_what_it_does_not_know_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        ExpertBias("quantile", **options)
