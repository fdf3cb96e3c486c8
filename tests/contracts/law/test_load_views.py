"""Loads seen through groups, costs and targets: every scope and rule against loops, and what papers write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.law._model import assert_close, aux, loss_of, make_step, net, new_history, policy, train_step, twin
from contracts.law._reference import (
    Seen,
    fractions_per_token,
    naive_bias_step,
    naive_view,
    reference_step,
    token_values,
)
from equipoise import AuxLoss, Balancer, ConfigError, ExpertBias, Sequences
from equipoise.functional.load_view import load_view, seen_load, target_excess, target_violation
from equipoise.functional.losses import balance_loss, load_fractions

DOUBLE: dict[str, Any] = {"dtype": torch.float64}
VIEWS: dict[str, dict] = {
    "equal groups": {"groups": 3},
    "uneven groups": {"groups": [[0, 4], [1], [2, 3, 5]]},
    "costs": {"costs": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]},
    "targets": {"targets": [0.3, 0.1, 0.1, 0.1, 0.2, 0.2]},
    "all": {"groups": [[5, 1], [0, 2, 3, 4]], "costs": [3.0, 1.0, 1.0, 0.5, 1.0, 2.0], "targets": [0.2, 0.8]},
}
SCOPES = ("sequence", "document", "micro_batch", "data_parallel", "global_batch")


def compare(description: dict, **step: Any) -> dict[str, float]:
    """Three micro-batches of the library against the loops: gradients, values, counts."""
    options = {"experts": (6, 6), "gate": "sigmoid", "selection_bias": True}
    model = net(**DOUBLE, **options)
    other, batches = twin(model), make_step(1, 3, 3, 4, documents=True, **step, **DOUBLE)
    balancer = Balancer(model, [policy(description), ExpertBias(rate=0.0)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    expected = reference_step(other, batches, loss_of, [description], new_history())
    plain = {name: value for name, value in description.items() if name not in ("groups", "costs", "targets")}
    without = reference_step(other, batches, loss_of, [plain], new_history())
    assert any(not torch.allclose(expected.gradients[n], without.gradients[n], rtol=1e-3) for n in without.gradients)
    assert_close(train_step(model, balancer, optimizer, batches), expected.gradients, 1e-11)
    found = balancer.metrics()
    assert found[f"balance/{balancer.schedule.names[0]}/loss"] == pytest.approx(expected.values[0], rel=1e-9)
    assert [c.tolist() for c in balancer.load()] == expected.counts
    return found


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("scope", SCOPES)
def test_every_scope_through_every_view(scope, view):
    compare(aux(scope, **VIEWS[view]), masked=True)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_windows_of_sequences(n, view):
    compare(aux("sequences", n=n, **VIEWS[view]))


@pytest.mark.parametrize("estimator", ["previous", "ema", "exact", "filled"])
def test_every_estimator_over_two_steps(estimator):
    description = aux("global_batch", estimator=estimator, **VIEWS["all"])
    model = net(**DOUBLE)
    other, history = twin(model), new_history()
    balancer = Balancer(model, [policy(description)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for seed in range(2 if estimator != "filled" else 1):
        step = make_step(seed, 2, **DOUBLE) if estimator != "filled" else make_step(seed, 1, **DOUBLE)
        wanted = description | ({"estimator": "prefix"} if estimator == "filled" else {})  # of one micro-batch the same
        expected = reference_step(other, step, loss_of, [wanted], history)
        assert_close(train_step(model, balancer, optimizer, step), expected.gradients, 1e-11)


def test_unbiased_choices_are_seen_through_it_too():
    compare(aux("sequence", counts="unbiased", **VIEWS["all"]), masked=True)


def test_two_views_of_one_scope_do_not_mix():
    """One count is made for both; each term sees its own."""
    descriptions = [aux("micro_batch", **VIEWS["all"]), aux("micro_batch"), aux("micro_batch", groups=2)]
    model = net(**DOUBLE)
    other, step = twin(model), make_step(0, **DOUBLE)
    balancer = Balancer(model, [policy(one) for one in descriptions])
    expected = reference_step(other, step, loss_of, descriptions, new_history())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    assert_close(train_step(model, balancer, optimizer, step), expected.gradients, 1e-11)
    metrics = balancer.metrics()
    got = [metrics[f"balance/{name}/loss"] for name in ("micro", "micro_2", "micro_3")]
    assert got == pytest.approx(expected.values, rel=1e-9)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own
def test_compiled_it_is_the_same():
    found = []
    for compiled in (False, True):
        model = net(**DOUBLE)
        policies = [AuxLoss(scope, 0.3, **VIEWS["all"]) for scope in ("sequence", "micro_batch", "global_batch")]
        balancer = Balancer(model, policies)
        if compiled:
            model.compile(fullgraph=True, backend="aot_eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        found.append((train_step(model, balancer, optimizer, make_step(0, masked=True, **DOUBLE)), balancer.metrics()))
    assert_close(found[1][0], found[0][0], 1e-12)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-9)


@pytest.mark.parametrize("rule", ["sign", "proportional", "rms", "momentum"])
@pytest.mark.parametrize(
    "view", [{"groups": 2}, {"targets": [0.4, 0.3, 0.1, 0.1, 0.1]}, {"groups": [[0, 1, 2, 3], [4]]}]
)
def test_bias_rules_are_driven_by_the_distance_from_the_target(rule, view):
    experts = 6 if view == {"groups": 2} else 5
    model = net(experts=(experts,), top_k=(2,), gate="sigmoid")
    balancer = Balancer(model, [ExpertBias(rule, rate=0.01, **view)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    bias, momentum = [0.0] * experts, [0.0] * experts
    for seed in range(3):
        train_step(model, balancer, optimizer, make_step(seed))
        counts = balancer.load()[0].tolist()
        bias, momentum = naive_bias_step(bias, counts, rule, 0.01, momentum, view=view)
        assert model.blocks[0].gate.expert_bias.tolist() == pytest.approx(bias, abs=1e-7)
    assert max(bias) > 0


def test_a_bias_reaches_uneven_targets():
    """The last expert does little and is to have a tenth; the rule of a bias without targets evens it out."""
    torch.manual_seed(0)
    x = torch.randn(1, 512, 8)
    found = []
    for targets in ((0.3, 0.3, 0.3, 0.1), None):
        model = net(experts=(4,), top_k=(1,), gate="sigmoid")
        balancer = Balancer(model, [ExpertBias("proportional", rate=0.05, targets=targets, name="wanted")])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for _ in range(200):
            balancer.tap(model(x).square().mean()).backward()
            optimizer.step()
        found.append(load_fractions(balancer.load()[0]))
        if targets:
            assert balancer.metrics()["balance/wanted/maxvio"] < 0.1
    assert (found[0] - torch.tensor([0.3, 0.3, 0.3, 0.1], dtype=torch.float64)).abs().max() < 0.02
    assert (found[1] - 0.25).abs().max() < 0.02


# ------------------------------------------------------------------------------------------- what papers write


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_group_loss_is_that_of_step_35_and_of_deepseek_v2(groups, size, seed):
    """Step-3.5: G sum_g f_g p_g. DeepSeek-V2 (arXiv 2405.04434, eq. 26-28): f' the mean of its experts' E c / (K T),
    P' the sum of their P."""
    generator = torch.Generator().manual_seed(seed)
    counts_E = torch.randint(0, 9, (groups * size,), generator=generator)
    probs_E = torch.rand(groups * size, generator=generator, dtype=torch.float64).softmax(dim=0)
    f_E = load_fractions(counts_E)
    ours = groups * size * (seen_load(load_view(groups), f_E) * probs_E).sum()
    f_G, p_G = (one.view(groups, size).sum(dim=1) for one in (f_E, probs_E))
    assert ours == pytest.approx(float(groups * (f_G * p_G).sum()), rel=1e-12)
    per_device_G = (groups * size * f_E).view(groups, size).mean(dim=1)
    assert ours == pytest.approx(float((per_device_G * p_G).sum()), rel=1e-12)


def test_the_parameter_penalty_of_hmoe():
    """arXiv 2408.10681: E sum_e M_e P_e with M the load weighted by width; of equal widths the usual loss."""
    widths, f_E, p_E = [9.0, 11.0, 13.0, 15.0], torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    relative = torch.tensor(widths) / 12  # their mean
    ours = 4 * (seen_load(load_view(costs=widths), f_E) * p_E).sum()
    assert float(ours) == pytest.approx(float(4 * (relative * f_E * p_E).sum()), rel=1e-6)
    assert torch.equal(seen_load(load_view(costs=[7.0] * 4), f_E), f_E)


@pytest.mark.parametrize("view", VIEWS)
def test_the_function_for_your_own_code_is_the_same(view):
    torch.manual_seed(0)
    logits = torch.randn(6, 6, **DOUBLE)
    ids = logits.topk(2, dim=-1).indices
    one = Seen(logits, "softmax", 2, 2, [True] * 5 + [False], None, [0.0] * 6, 1, 1)
    description = aux("sequence", **VIEWS[view])
    f_TE = fractions_per_token([[one]], 0, 0, description, new_history())
    expected = token_values(one, [naive_view(f, description) for f in f_TE]).mean()
    options = {"segment_T": torch.tensor([0, 0, 0, 1, 1, 1]), "token_mask_T": torch.tensor(one.mask_T)}
    got = balance_loss(logits.softmax(dim=-1), ids, **options, view=load_view(**VIEWS[view]))
    assert float(got) == pytest.approx(float(expected), rel=1e-12)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_on_target_the_loss_is_1_and_no_bias_moves(data):
    """Whatever groups, costs and targets: loads and probabilities as they are wanted, spread evenly inside a group."""
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    experts = data.draw(st.permutations(range(sum(sizes))))
    groups = [list(experts[sum(sizes[:i]) : sum(sizes[: i + 1])]) for i in range(len(sizes))]
    parts = data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    costs = data.draw(st.lists(st.floats(0.1, 10), min_size=sum(sizes), max_size=sum(sizes)))
    view = load_view(groups, costs, [part / sum(parts) for part in parts])
    assert view is not None
    load_E = torch.zeros(sum(sizes), dtype=torch.float64)
    for group, part in zip(groups, parts, strict=True):
        load_E[group] = part / len(group)
    f_E = load_fractions(load_E * 6)
    assert float(len(f_E) * (seen_load(view, f_E) * f_E).sum()) == pytest.approx(1.0, rel=1e-9)
    assert target_violation(view, load_E * 6).abs().max() < 1e-12
    assert float(target_excess(view, load_E * 6)) == pytest.approx(0.0, abs=1e-12)


def test_the_usual_view_said_in_words_is_the_usual():
    """Each expert alone, equal shares: the same gradients as without."""
    found = []
    for view in ({}, {"groups": 6}, {"targets": [1 / 6] * 6}, {"groups": [[e] for e in range(6)], "costs": [2.0] * 6}):
        model = net(**DOUBLE)
        balancer = Balancer(model, [AuxLoss("micro_batch", 0.3, **view), AuxLoss(Sequences(3), 0.3, **view)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        found.append(train_step(model, balancer, optimizer, make_step(0, **DOUBLE)))
    for other in found[1:]:
        assert_close(other, found[0], 1e-12)


# ------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("view", "said"),
    [
        ({"groups": [[0, 1], [1, 2]]}, "expert 1 in two"),
        ({"groups": [[0, 1], []]}, "numbers of the experts in a group"),
        ({"groups": []}, "one group or more"),
        ({"groups": 0}, "one group or more"),
        ({"groups": "2"}, "groups as a list"),
        ({"groups": [0, 1]}, "groups as a list"),
        ({"costs": [1.0, 0.0]}, "costs above 0"),
        ({"costs": [1.0, float("nan")]}, "costs above 0"),
        ({"targets": [0.5, 0.4]}, "sum to 1"),
        ({"targets": [1.5, -0.5]}, "targets above 0"),
        ({"targets": 0.5}, "targets as a list"),
    ],
)
def test_what_is_wrong_for_any_model_is_refused_when_a_policy_is_made(view, said):
    with pytest.raises(ConfigError, match=said):
        AuxLoss(**view)


@pytest.mark.parametrize(
    ("view", "said"),
    [
        ({"groups": [[0, 1], [2, 3]]}, "expert 4 in no group"),
        ({"groups": [[0, 1, 2, 3, 4, 5, 6]]}, "no expert 6"),
        ({"groups": 4}, "4 equal groups"),
        ({"targets": [0.5, 0.5]}, "a target for each expert"),
        ({"groups": 2, "targets": [0.2, 0.2, 0.6]}, "a target for each group"),
        ({"costs": [1.0] * 5}, "a cost for each expert"),
    ],
)
def test_what_does_not_fit_a_router_is_refused_when_it_is_attached(view, said):
    model = net()
    with pytest.raises(ConfigError, match=said):
        Balancer(model, [AuxLoss("sequence", **view)])
    assert model.blocks[0].gate.balance_state is None
    if "costs" not in view:
        with pytest.raises(ConfigError, match=said):
            Balancer(net(gate="sigmoid"), [ExpertBias(**view)])


def test_the_control_of_a_bias_has_no_targets():
    with pytest.raises(ConfigError, match="the load of the whole step"):
        ExpertBias(scope="micro_batch", groups=2)


def test_it_is_said_and_measured():
    """describe() names it; MaxVio of groups is 0 where experts are uneven and groups are not."""
    model = net(**DOUBLE)
    balancer = Balancer(model, [AuxLoss("micro_batch", 0.0, groups=1, name="device")])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train_step(model, balancer, optimizer, make_step(0, **DOUBLE))
    assert "1 group" in balancer.describe()
    assert balancer.metrics()["balance/device/maxvio"] == 0.0 < balancer.metrics()["balance/maxvio_global"]
