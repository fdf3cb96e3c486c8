"""The expert bias: rules by name, frozen to the last bit, and balancing a simulated router, or failing to."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from equipoise.errors import ConfigError
from equipoise.functional import GATES, PLACES, maxvio, momentum_step, proportional_step, rms_step, route, sign_step
from equipoise.functional.quantile import Selection, choice_offsets, count_offsets, pooled_quantile
from equipoise.functional.updates import RULES
from equipoise.policies import ExpertBias
from equipoise.policies.expert_bias import LARGEST_STEP

STEPS = {"sign": sign_step, "proportional": proportional_step, "rms": rms_step}
NO_MOMENTUM = torch.zeros(4, dtype=torch.float64)
COUNTS = torch.tensor([40.0, 3, 0, 9], dtype=torch.float64)


def simulate(policy: ExpertBias, gate: str, num_experts: int, top_k: int, steps: int = 200, spread: float = 0.4):
    """MaxVio at every step of a router whose scores never change: only the bias can balance it."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1024, num_experts, generator=generator) + spread * torch.randn(
        num_experts, generator=generator
    )
    bias, momentum = torch.zeros(num_experts), torch.zeros(num_experts, dtype=torch.float64)
    seen = []
    for step in range(steps):
        counts = route(logits, top_k, gate=gate, selection_bias_E=bias, bias_place=policy.place).counts_E
        seen.append(float(maxvio(counts)))
        bias, momentum = policy.step(bias, counts, momentum, step)
    return seen


RATES = {  # per gate: what a full-size step (sign, rms) and a proportional one (also momentum) may be
    "softmax": (1e-3, 0.1 / 16),
    "sigmoid": (3e-3, 1e-2),
    "sqrt_softplus": (3e-3, 1e-2),
}


FACTORS = {"multiply": (5e-3, 5e-2), "logits": (1e-2, 1e-1)}  # the same for every gate


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gate", GATES)
def test_every_valid_pair_balances_a_router_with_fixed_scores(gate, rule, place):
    full, proportional = FACTORS.get(place, RATES[gate])
    policy = ExpertBias(rule=rule, rate=full if rule in ("sign", "rms") else proportional, place=place)
    policy.check_gate(gate, 16)
    seen = simulate(policy, gate, 16, 2)
    assert seen[0] > 0.8
    assert max(seen[-50:]) < 0.25
    assert sum(seen[-50:]) / 50 < 0.15


@pytest.mark.parametrize("place", ["scores", "logits"])
@pytest.mark.parametrize("gate", GATES)
def test_the_quantile_rule_needs_a_few_steps_whatever_the_size_of_a_score(gate, place):
    """64 experts: a softmax score is about 1/64. The first step goes nearly all the way, to a sixteenth of it."""
    policy, share = ExpertBias("quantile", place=place), torch.full((64,), 4 / 64)
    logits = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)) + torch.linspace(-1, 1, 64)
    bias, seen = torch.zeros(64), []
    for step in range(6):
        routing = route(logits, 4, gate=gate, selection_bias_E=bias, bias_place=place)
        seen.append(float(maxvio(routing.counts_E)))
        offset = choice_offsets(logits, routing.expert_ids_TK, gate, Selection(bias, place))
        rule = pooled_quantile(count_offsets(offset), share)
        bias, _ = policy.step(bias, routing.counts_E, NO_MOMENTUM, step, rule)
    assert seen[0] > 2 and seen[1] < 0.5 * seen[0] and seen[5] < 0.1
    with pytest.raises(ConfigError, match="pooled_quantile"):
        policy.step(bias, routing.counts_E, NO_MOMENTUM, 0)


@pytest.mark.parametrize("rule", ["sign", "rms"])
def test_the_refused_pair_swings_and_the_named_remedies_settle(rule):
    """Full-size steps of 1e-3 on softmax scores of 1/64: 6 % of a score, for ever."""
    refused = ExpertBias(rule=rule, rate=1e-3)
    with pytest.raises(ConfigError) as caught:
        refused.check_gate("softmax", 64)
    assert "proportional" in caught.value.do
    assert "0.002" in caught.value.do
    tail = simulate(refused, "softmax", 64, 4, spread=0.7)[-50:]
    assert sum(tail) / 50 > 0.2
    for remedy, gate in ((ExpertBias("proportional", 0.1 / 64), "softmax"), (refused, "sigmoid")):
        remedy.check_gate(gate, 64)
        settled = simulate(remedy, gate, 64, 4, steps=300, spread=0.7)[-50:]
        assert sum(settled) / 50 < 0.1


@pytest.mark.parametrize("place", PLACES)
def test_at_the_largest_step_of_a_place_selection_swings_alike(place):
    """A step on the scores is measured against 1/E; a factor or a logit changes any score by about the rate.

    A factor that has fallen takes it harder, so the same rate swings more there.
    """
    experts = 64
    largest = LARGEST_STEP[place] / (experts if place == "scores" else 1)
    policy = ExpertBias("sign", largest, place=place)
    policy.check_gate("softmax", experts)
    tail = simulate(policy, "softmax", experts, 4, steps=500, spread=0.7)[-50:]
    assert 0.1 < sum(tail) / 50 < (0.35 if place == "logits" else 0.25)
    refused = replace(policy, rate=5 * largest)
    with pytest.raises(ConfigError, match="sigmoid") as caught:
        refused.check_gate("softmax", experts)
    assert "rule='proportional'" in caught.value.do
    tail = simulate(refused, "softmax", experts, 4, steps=500, spread=0.7)[-50:]
    assert sum(tail) / 50 > 0.4
    remedy = ExpertBias("proportional", 0.1 / (experts if place == "scores" else 1), place=place)
    remedy.check_gate("softmax", experts)
    tail = simulate(remedy, "softmax", experts, 4, steps=500, spread=0.7)[-50:]
    assert sum(tail) / 50 < 0.1


@pytest.mark.parametrize("experts", [8, 128])
def test_on_logits_one_rate_serves_any_number_of_experts(experts):
    """0.1, which balances 2,048 experts in public runs: on logits a tenth of any score, on scores far more than one."""
    sign, slower = (ExpertBias(rule, 0.1, place="logits") for rule in ("sign", "proportional"))
    sign.check_gate("softmax", 2048)
    with pytest.raises(ConfigError, match=r"place=.logits. with a rate of at most 0\.1") as caught:
        replace(sign, place="scores").check_gate("softmax", 2048)
    assert "MaxVio" in caught.value.expected
    first, *_, last = simulate(sign, "softmax", experts, 2, steps=150, spread=0.7)
    assert first > 1 and last < 0.35 * first
    settled = simulate(slower, "softmax", experts, 2, steps=150, spread=0.7)[-50:]
    assert sum(settled) / 50 < 0.5 * sum(simulate(sign, "softmax", experts, 2, spread=0.7)[-50:]) / 50


def test_a_sign_step_keeps_moving_in_balance_and_a_proportional_one_comes_to_rest():
    sign = simulate(ExpertBias("sign", 3e-3), "sigmoid", 16, 2)[-50:]
    rest = simulate(ExpertBias("proportional", 1e-2), "sigmoid", 16, 2)[-50:]
    assert max(rest) < 0.5 * min(sign)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_is_rate_times_rule_centred(rule, dtype):
    bias = torch.tensor([0.3, -0.1, 0.0, -0.2], dtype=dtype)
    policy = ExpertBias(rule=rule, rate=1e-2, schedule=lambda step: 1 / (1 + step), kappa=3.0, beta=0.25)
    momentum = torch.tensor([0.1, 0.2, -0.1, 0.0], dtype=torch.float64)
    before = bias.clone()
    new, new_momentum = policy.step(bias, COUNTS, momentum, 4)
    delta = momentum_step(COUNTS, momentum, 3.0, 0.25) if rule == "momentum" else STEPS[rule](COUNTS)
    moved = bias.double() + 1e-2 / 5 * delta
    torch.testing.assert_close(new, (moved - moved.mean()).to(dtype), rtol=0, atol=0)
    assert new.dtype == dtype
    assert torch.equal(bias, before)
    assert torch.equal(new_momentum, delta if rule == "momentum" else momentum)


@pytest.mark.parametrize("rule", RULES)
def test_factors_are_centred_by_their_mean_and_logits_by_a_sum(rule):
    bias, momentum = torch.tensor([0.3, -0.1, 0.0, -0.2], dtype=torch.float64), NO_MOMENTUM
    delta = momentum_step(COUNTS, momentum) if rule == "momentum" else STEPS[rule](COUNTS)
    factors, _ = ExpertBias(rule, 0.5, place="multiply").step(bias, COUNTS, momentum, 0)
    moved = 1 + bias + 0.5 * delta
    torch.testing.assert_close((1 + factors) / (1 + factors[0]), moved / moved[0], rtol=1e-12, atol=0)
    assert abs(float(factors.mean())) < 1e-15
    logits, _ = ExpertBias(rule, 0.5, place="logits").step(bias, COUNTS, momentum, 0)
    assert torch.equal(logits, ExpertBias(rule, 0.5).step(bias, COUNTS, momentum, 0)[0])


@pytest.mark.parametrize("place", PLACES)
def test_a_step_of_the_rule_may_come_from_elsewhere(place):
    """For scope "micro_batch": the counts are not asked then."""
    policy, bias = ExpertBias("sign", 0.1, place=place), torch.zeros(4)
    got, _ = policy.step(bias, COUNTS.flip(0), NO_MOMENTUM, 0, sign_step(COUNTS))
    assert torch.equal(got, policy.step(bias, COUNTS, NO_MOMENTUM, 0)[0])


@pytest.mark.parametrize("rule", RULES)
def test_a_frozen_rate_keeps_every_bit(rule):
    bias = torch.randn(4, generator=torch.Generator().manual_seed(0)) + 5  # not centred: a loaded bias stays as it is
    for frozen in (ExpertBias(rule, rate=0.0), ExpertBias(rule, schedule=lambda _: 0)):
        assert torch.equal(frozen.step(bias, COUNTS, NO_MOMENTUM, 7)[0], bias)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rule", RULES)
def test_the_bias_does_not_drift(rule, place):
    bias, momentum = torch.zeros(8), torch.zeros(8, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for step in range(300):
        counts = torch.randint(0, 100, (8,), generator=generator) ** 2  # lop-sided: more experts below the mean
        bias, momentum = ExpertBias(rule, 1e-2, place=place).step(bias, counts, momentum, step)
        assert abs(float(bias.double().mean())) < 1e-7


@pytest.mark.parametrize("rule", RULES)
def test_a_step_without_tokens_moves_nothing(rule):
    bias = torch.tensor([0.5, -0.25, -0.125, -0.125])
    assert torch.equal(ExpertBias(rule, 1e-2).step(bias, torch.zeros(4), NO_MOMENTUM, 0)[0], bias)


@pytest.mark.parametrize("rule", RULES)
def test_the_starved_expert_rises_and_the_crowded_one_falls(rule):
    bias, _ = ExpertBias(rule, 1e-2).step(torch.zeros(4), COUNTS, NO_MOMENTUM, 0)
    assert bias[2] == bias.max()
    assert bias[0] == bias.min()
    assert bias[0] < 0 < bias[2]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("rate", "num_experts"), [(1e-3, 8), (1e-3, 64), (1e-2, 8), (1e-4, 256)])
def test_only_full_size_steps_on_small_softmax_scores_are_refused(gate, rule, rate, num_experts):
    known_to_fail = gate == "softmax" and rule in ("sign", "rms") and rate * num_experts > 0.05
    policy = ExpertBias(rule, rate)
    if known_to_fail:
        with pytest.raises(ConfigError, match="sigmoid"):
            policy.check_gate(gate, num_experts)
    else:
        policy.check_gate(gate, num_experts)


@pytest.mark.parametrize("place", ["multiply", "logits"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("rule", RULES)
def test_the_number_of_experts_does_not_matter_to_factors_and_logits(gate, rule, place):
    for rate in (1e-3, 1e-2):
        for num_experts in (8, 2048):
            ExpertBias(rule, rate, place=place).check_gate(gate, num_experts)
    fast = ExpertBias(rule, 0.2, place=place)
    if gate == "softmax" and rule in ("sign", "rms"):
        with pytest.raises(ConfigError, match=f"rate of at most {LARGEST_STEP[place]}"):
            fast.check_gate(gate, 8)
    else:
        fast.check_gate(gate, 8)


@pytest.mark.parametrize(
    ("word", "arguments"),
    [
        ("did you mean 'proportional'", {"rule": "proportionl"}),
        ("rule", {"rule": ["sign"]}),
        ("rate", {"rate": -1e-3}),
        ("rate", {"rate": math.nan}),
        ("rate", {"rate": math.inf}),
        ("rate", {"rate": "1e-3"}),
        ("kappa", {"rule": "momentum", "kappa": 0.0}),
        ("beta", {"rule": "momentum", "beta": 1.0}),
        ("did you mean 'logits'", {"place": "logit"}),
        ("place", {"place": ("logits",)}),
        ("did you mean 'micro_batch'", {"scope": "microbatch"}),
        ("scope of a bias", {"scope": "sequence"}),
        ("below 1", {"place": "multiply", "rate": 1.0}),
        ("memory", {"rule": "momentum", "scope": "micro_batch"}),
    ],
)
def test_numbers_that_cannot_work_are_refused(word, arguments):
    with pytest.raises(ConfigError) as caught:
        ExpertBias(**arguments)
    assert word in str(caught.value)


@pytest.mark.parametrize("factor", [math.nan, math.inf, -1.0])
def test_a_schedule_that_would_poison_the_bias_is_refused(factor):
    policy = replace(ExpertBias(), schedule=lambda step: factor if step == 3 else 1.0)
    policy.step(torch.zeros(4), COUNTS, NO_MOMENTUM, 2)
    with pytest.raises(ConfigError, match="step 3"):
        policy.step(torch.zeros(4), COUNTS, NO_MOMENTUM, 3)


def test_a_schedule_that_would_take_a_factor_below_zero_is_refused():
    policy = ExpertBias(rate=0.5, place="multiply", schedule=lambda step: 1.0 + step)
    policy.step(torch.zeros(4), COUNTS, NO_MOMENTUM, 0)
    with pytest.raises(ConfigError, match=r"rate \* factor < 1"):
        policy.step(torch.zeros(4), COUNTS, NO_MOMENTUM, 1)
