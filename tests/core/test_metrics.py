"""What metrics() says, against loops over tokens and against autograd at the logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from core._model import aux, loss_of, make_step, net, new_history, policy, train_step, twin
from core._reference import naive_maxvio, naive_scores, reference_step
from equipoise import Balancer, ExpertBias
from equipoise.readout import fidelity

DOUBLE: dict[str, Any] = {"dtype": torch.float64}
POLICIES = [
    aux("micro_batch", 0.2),
    aux("sequence", 0.1),
    aux("document", 0.15),
    aux("sequences", 0.1, n=3),
    aux("global_batch", 0.05),
    aux("global_batch", 0.05, estimator="ema"),
    {"kind": "z", "coef": 0.01},
]


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("mode", ["plain", "non_reentrant"])
def test_values_and_ratios_of_every_policy(gate, mode):
    """Loss values are means over tokens and layers (B84: every layer, no other); the ratio is of true gradients."""
    model = net(mode=mode, gate=gate, experts=(6,), top_k=(2,), **DOUBLE)
    other = twin(model)
    balancer = Balancer(model, [policy(d) for d in POLICIES])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = new_history()
    for seed in range(2):
        other.load_state_dict(model.state_dict())
        step = make_step(seed, 3, masked=True, documents=True, **DOUBLE)
        expected = reference_step(other, step, loss_of, POLICIES, history)
        train_step(model, balancer, optimizer, step)
        found = balancer.metrics()
        for i in range(len(POLICIES)):
            assert found[f"balance/policy_{i}/loss"] == pytest.approx(expected.values[i], rel=1e-6)
            assert found[f"balance/policy_{i}/gradient_ratio"] == pytest.approx(expected.ratios[i], rel=1e-6)


def test_the_language_model_s_gradient_is_what_arrives_from_above():
    """Several layers: the denominator holds what later layers' balance sends down; exact as coefficients shrink."""
    small = [aux("micro_batch", 1e-7)]
    model = net(**DOUBLE)
    other = twin(model)
    balancer = Balancer(model, [policy(d) for d in small])
    step = make_step(0, 2, **DOUBLE)
    expected = reference_step(other, step, loss_of, small, new_history())
    train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.1), step)
    assert balancer.metrics()["balance/policy_0/gradient_ratio"] == pytest.approx(expected.ratios[0], rel=1e-5)


def test_load_metrics_at_every_scope():
    """B85: MaxVio per layer at sequence, micro-batch and global scope; dead experts; top-K score; nothing padded."""
    model = net(**DOUBLE, experts=(6, 12), top_k=(2, 1), gate="sigmoid")
    other = twin(model)
    balancer = Balancer(model, [policy(aux("sequence", 0.1)), ExpertBias(rule="sign", rate=0.01)])
    step = make_step(3, 3, 2, 4, masked=True, **DOUBLE)
    seen = reference_step(other, step, loss_of, [], new_history()).seen
    train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.1), step)
    found = balancer.metrics()
    dead = tokens = 0
    means: dict[str, list[float]] = {}
    for layer in range(2):
        rows = [row[layer] for row in seen]
        total = [sum(c) for c in zip(*(one.counts() for one in rows), strict=True)]
        per_sequence = [
            one.counts(one.tokens_of(range(s, s + 1))) for one in rows for s in range(one.num_sequences)
        ]  # fmt: skip
        tokens = sum(one.num_valid for one in rows)
        scores = [naive_scores(one.logits_TE, "sigmoid") for one in rows]
        chosen = sum(
            (score[t] / score[t].sum())[e].item()
            for one, score in zip(rows, scores, strict=True)
            for t in range(len(one.ids)) if one.mask_T[t]
            for e in one.ids[t]
        )  # fmt: skip
        mean = sum(total) / len(total)
        shares = [c / sum(total) for c in total if c]
        expected = {
            "maxvio_global": naive_maxvio(total),
            "maxvio_micro_batch": sum(naive_maxvio(one.counts()) for one in rows) / len(rows),
            "maxvio_sequence": sum(map(naive_maxvio, per_sequence)) / len([c for c in per_sequence if sum(c)]),
            "cv_global": math.sqrt(sum((c - mean) ** 2 for c in total) / len(total)) / mean,
            "entropy_global": -sum(f * math.log(f) for f in shares) / math.log(len(total)),
            "dead_experts": total.count(0),
            "topk_score": chosen / tokens,
            "bias_max": model.blocks[layer].gate.expert_bias.abs().max().item(),
        }
        dead += total.count(0)
        for key, value in expected.items():
            assert found[f"balance/layer_{layer:02d}/{key}"] == pytest.approx(value, rel=1e-6), key
            means.setdefault(key, []).append(value)
    assert found["balance/dead_experts"] == dead
    for key, values in means.items():
        if key != "dead_experts":
            assert found[f"balance/{key}"] == pytest.approx(sum(values) / 2, rel=1e-6), key
    assert found["balance/tokens"] == tokens
    assert balancer.load()[0].dtype == torch.int64


def test_metrics_are_of_the_whole_step_and_not_of_its_last_micro_batch():
    """Automodel keeps the last micro-batch's load only; here every token of the step is in."""
    model = net(experts=(6,), top_k=(2,))
    balancer = Balancer(model, [policy(aux("micro_batch", 0.0))])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loads = []
    for micro in (step := make_step(0, 4)):
        train_step(model, balancer, optimizer, [micro])
        loads.append(balancer.load()[0])
    train_step(model, balancer, optimizer, step)
    assert torch.equal(balancer.load()[0], torch.stack(loads).sum(0))
    assert balancer.metrics()["balance/tokens"] == 40


def test_a_fidelity_whose_square_was_rounded_below_zero_is_a_number():
    """f of an even load has a push of zero: what is left of its square is rounding, of either sign."""
    found = fidelity(["ema"], torch.tensor([1e-4, 1e-4, 0.0, -1e-19], dtype=torch.float64))
    assert found == {"relative_error": {"ema": 1.0}, "cosine": {"ema": 0.0}}
