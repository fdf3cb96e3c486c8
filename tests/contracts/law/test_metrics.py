"""What metrics() says, against loops over tokens and against autograd at the logits."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from _named import named
from contracts.law._model import aux, loss_of, make_step, net, new_history, policy, train_step, twin
from contracts.law._reference import naive_maxvio, naive_scores, reference_step
from equipoise import AuxLoss, Balancer, ExpertBias, MoE
from equipoise.balancer.estimator_error import estimator_error

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
    balancer = Balancer(model, named(policy(d) for d in POLICIES))
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
    assert balancer.metrics()[f"balance/{balancer.schedule.names[0]}/gradient_ratio"] == pytest.approx(
        expected.ratios[0], rel=1e-5
    )


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
    found = estimator_error(["ema"], torch.tensor([1e-4, 1e-4, 0.0, -1e-19], dtype=torch.float64))
    assert found == {"relative_error": {"ema": 1.0}, "cosine": {"ema": 0.0}}


class Dropped(torch.nn.Module):
    """Residual layers of which a step leaves some out."""

    def __init__(self, **router: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(MoE(8, 8, 4, 2, batch_first=True, **router) for _ in range(3)).double()
        self.skip: set[int] = set()

    def forward(self, x_BSD, mask_BS=None):
        for i, block in enumerate(self.blocks):
            x_BSD = x_BSD if i in self.skip else x_BSD + block(x_BSD, token_mask_BS=mask_BS)
        return x_BSD


def dropped_step(model: Dropped, policies: list, micro_batches: list, **options: Any) -> dict[str, float]:
    """Metrics of a step over (tokens, mask, layers left out)."""
    balancer = Balancer(model, policies, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for x_BSD, mask_BS, skip in micro_batches:
        model.skip = skip
        (balancer.tap(model(x_BSD, mask_BS).square().mean()) / len(micro_batches)).backward()
    optimizer.step()
    found = balancer.metrics()
    balancer.remove()
    return found


LAW = [policy(aux("global_batch", 0.1)), policy(aux("sequence", 0.1)), policy({"kind": "z", "coef": 0.01})]


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_without_tokens_is_in_no_mean_and_is_counted(bias):
    """Means are those of a step in which the layer does not exist; its own names are not there."""
    x = torch.randn(2, 6, 8, **DOUBLE)
    policies = [*LAW, ExpertBias(rate=0.01, rule="proportional")] if bias else LAW
    whole, without = (dropped_step(Dropped(), policies, [(x, None, skip)]) for skip in (set(), {2}))
    first = Dropped()
    del first.blocks[2]
    alone = dropped_step(first, policies, [(x, None, set())])
    gone = {key for key in whole if "layer_02/" in key and "recompute_flips" not in key and "bias_max" not in key}
    assert whole.keys() - without.keys() == gone and len(gone) == 8
    for key, value in alone.items():
        if "layers_without_tokens" not in key and "bias_max" not in key:
            assert without[key] == pytest.approx(value, rel=1e-12), key
    assert without["balance/layers_without_tokens"] == 1
    assert whole["balance/layers_without_tokens"] == alone["balance/layers_without_tokens"] == 0
    json.dumps(without, allow_nan=False)


def test_without_any_token_nothing_is_said_of_balance():
    x, none = torch.randn(2, 6, 8, **DOUBLE), torch.zeros(2, 6, dtype=torch.bool)
    found = dropped_step(Dropped(), LAW, [(x, none, set())])
    assert not [key for key in found if "maxvio" in key or "entropy" in key or "dead" in key or "/loss" in key]
    assert found["balance/layers_without_tokens"] == 3
    assert found["balance/tokens"] == 0
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("as_passes", [False, True])
def test_micro_batches_of_padding_only_do_not_dilute_the_mean(as_passes):
    """Four micro-batches of two sequences, the second all padding; in one pass or in four."""
    torch.manual_seed(1)
    x, mask = torch.randn(8, 6, 8, **DOUBLE), torch.rand(8, 6) < 0.7
    mask[2:4] = False
    mask[4] = False  # half a micro-batch
    model = Dropped()
    step = [(x[i : i + 2], mask[i : i + 2], set()) for i in range(0, 8, 2)]
    if as_passes:
        found = dropped_step(model, LAW, step)
    else:
        found = dropped_step(model, LAW, [(x, mask, set())], sequences_per_micro_batch=2)
    with torch.no_grad():
        ids = model.blocks[0].gate(x.view(-1, 8)).expert_ids_TK.view(8, 6, 2)
    loads = [[int((ids[s][mask[s]] == e).sum()) for e in range(4)] for s in range(8)]
    micro = [[sum(c) for c in zip(*loads[i : i + 2], strict=True)] for i in range(0, 8, 2)]
    for key, rows in (("sequence", loads), ("micro_batch", micro)):
        seen = [naive_maxvio(row) for row in rows if sum(row)]
        assert len(seen) == {"sequence": 5, "micro_batch": 3}[key]
        assert found[f"balance/layer_00/maxvio_{key}"] == pytest.approx(sum(seen) / len(seen), rel=1e-12)


def test_passes_of_uneven_size_weigh_every_micro_batch_alike():
    """Three micro-batches in one pass and one in the next, of which the last is short."""
    torch.manual_seed(2)
    x, model = torch.randn(7, 6, 8, **DOUBLE), Dropped()
    uneven = dropped_step(model, LAW, [(x[:6], None, set()), (x[6:], None, set())], sequences_per_micro_batch=2)
    single = dropped_step(model, LAW, [(x[i : i + 2], None, set()) for i in range(0, 7, 2)])
    for key in uneven:
        if "maxvio" in key:
            assert uneven[key] == pytest.approx(single[key], rel=1e-12), key


@pytest.mark.parametrize("counts", ["dispatched", "unbiased"])
@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_tokens_are_counted_where_top_k_changes_while_one_trains(top_k, counts):
    """Attached at K = 2; the reference makes its balancer after the change."""
    x, found = torch.randn(2, 6, 8, **DOUBLE), []
    for late in (False, True):
        model = Dropped(normalize=False)  # at K = 1 a normalised weight is told of
        gates = [block.gate for block in model.blocks]
        for gate in gates if late else []:
            gate.top_k = top_k
        policies = [AuxLoss("sequence", 0.1 if top_k < 4 else 0.0, counts=counts), *LAW[2:]]
        balancer = Balancer(model, named(policies))
        for gate in gates:
            gate.top_k = top_k
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        balancer.tap(model(x).square().mean()).backward()
        optimizer.step()
        found.append((balancer.metrics(), [p.grad for p in model.parameters()]))
    (changed, gradients), (known, wanted) = found
    assert changed == known
    assert all(torch.equal(got, want) for got, want in zip(gradients, wanted, strict=True))
    assert changed["balance/tokens"] == 12
    assert ("balance/maxvio_global" in changed) == ("balance/policy_0/loss" in changed) == (top_k < 4)


def test_a_collapsed_soft_gate_is_not_perfect():
    """K = E: every load is even by definition, so only the gate's own weights can tell."""
    torch.manual_seed(0)
    layer = MoE(8, 8, 4, 4, normalize=False).double()
    with torch.no_grad():
        layer.gate.weight[2] += 3.0
    balancer = Balancer(layer, [AuxLoss(coef=0.0)])
    optimizer, x = torch.optim.SGD(layer.parameters(), lr=0.0), torch.randn(2, 6, 8, **DOUBLE) + 1
    balancer.tap(layer(x).square().mean()).backward()
    optimizer.step()
    found = balancer.metrics()
    mean_E = [
        sum(column) / 12 for column in zip(*(x.view(-1, 8) @ layer.gate.weight.T).softmax(-1).tolist(), strict=True)
    ]
    assert found["balance/maxvio_gate"] == pytest.approx(4 * max(mean_E) - 1)
    assert found["balance/maxvio_gate"] > 2.9
    assert not [key for key in found if key.endswith(("_global", "_sequence", "_micro_batch", "dead_experts", "loss"))]
