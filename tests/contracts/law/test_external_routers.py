"""Routers of one's own: noise, masks, dropped choices, no parameters, each against a naive float64 loop."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from contracts.law._external import Block, Chain, D, E, Gate, ids_of, naive_law, naive_push, pushed
from equipoise import AuxLoss, Balancer, ConfigError, ExpertBias, InputError, ZLoss
from equipoise.functional import GATES, route

X = torch.randn(2, 16, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BIAS = ExpertBias(rule="proportional", rate=1e-2)
STILL = ExpertBias(rule="proportional", rate=0.0)


def model_of(kind: str = "plain", gate: str = "softmax", **options: Any) -> tuple[Chain, Gate]:
    torch.manual_seed(0)
    router = Gate(kind, gate, **options)
    return Chain(Block(router)).double().train(), router


# ---------------------------------------------------------------- our bias on a router that does more than it returns


@pytest.mark.parametrize("kind", ["plain", "jitter", "noise shown", "mask shown"])
@pytest.mark.parametrize("gate", GATES)
def test_a_router_that_returns_what_it_chose_by_gets_a_bias(kind: str, gate: str) -> None:
    """At bias 0, training is the same as without a balancer; then the bias moves."""
    model, _ = model_of(kind, gate)
    torch.manual_seed(5)
    before = model(X)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    balancer = Balancer(model, [BIAS], example={"x": X})
    torch.manual_seed(5)
    after = model(X)
    assert torch.allclose(before, after, atol=1e-12)
    balancer.tap(after.square().mean()).backward()
    optimizer.step()
    assert balancer.load()[0].sum() == X.shape[0] * X.shape[1] * 2
    if kind == "mask shown":
        assert balancer.load()[0][E - 1] == 0


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("noise hidden", r"in training mode \d+ of 256 tokens go to experts that its logits do not choose"),
        ("mask hidden", r"in training mode \d+ of 256 tokens go to experts that its logits do not choose"),
        ("dropped experts", r"in training mode \d+ of 256 tokens go to experts that its logits do not choose"),
        ("dropped choices", r"in training mode \d+ of 256 tokens have choices that it drops"),
        ("dynamic k", r"in training mode \d+ of 256 tokens have choices that it drops"),
        ("dropout", r"in training mode the weights of \d+ of 256 tokens do not follow from its logits"),
        ("groups", "it leaves out experts that a choice by its logits would take"),
    ],
)
def test_a_router_that_does_more_than_it_returns_gets_none(kind: str, what: str) -> None:
    """It would be undone in silence. Refused in three parts, and nothing of the model has changed."""
    model, _ = model_of(kind)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    with pytest.raises(ConfigError, match=what) as caught:
        Balancer(model, [BIAS], example={"x": X})
    assert "AuxLoss" in caught.value.do
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    Balancer(model, [AuxLoss("micro_batch", 0.1)], example={"x": X})  # what it says to do
    model(X)


def test_the_remedy_for_hidden_noise_is_to_return_it() -> None:
    model, router = model_of("noise hidden")
    with pytest.raises(ConfigError, match="let Gate return the logits that it chooses by") as caught:
        Balancer(model, [BIAS], example={"x": X})
    assert "-inf" in caught.value.do
    router.kind = "noise shown"
    Balancer(model, [BIAS], example={"x": X})


@pytest.mark.parametrize("kind", ["noise shown", "noise hidden", "mask shown", "dropped experts"])
@pytest.mark.parametrize("gate", GATES)
def test_a_loss_is_pushed_by_what_is_returned(kind: str, gate: str) -> None:
    """f of the choices that were made, p of the logits that were returned."""
    model, router = model_of(kind, gate)
    got, metrics, load = pushed(model, router.linear.weight, X, lambda c: [AuxLoss("micro_batch", c)])
    assert router.seen is not None
    shown, _, ids = router.seen
    hidden = (shown == float("-inf")).flatten(0, -2)
    loss, counts = naive_law(shown.detach(), ids_of(ids), gate)
    assert load[0].tolist() == counts
    assert metrics["balance/policy_0/loss"] == pytest.approx(float(loss), rel=1e-9)
    if kind != "noise shown":  # there the logits are not linear in the input alone
        want = naive_push(X, router.linear.weight, ids_of(ids), gate, hidden=hidden)
        assert float((got - want).norm() / want.norm()) < 1e-10


# ---------------------------------------------------------------- logits of -inf: an expert that is not there

some_logits = st.integers(0, 2**31 - 1).map(lambda seed: torch.Generator().manual_seed(seed))


def masked_logits(draw: torch.Generator, tokens: int, experts: int, least: int) -> Tensor:
    """Logits of which each token keeps at least ``least``."""
    z = 3 * torch.randn(tokens, experts, generator=draw, dtype=torch.float64)
    hidden = torch.rand(tokens, experts, generator=draw) < 0.4
    first = torch.rand(tokens, experts, generator=draw).topk(least, dim=-1).indices
    return z.masked_fill(hidden.scatter(-1, first, False), float("-inf"))


def naive_score(v: float, gate: str, row: list[float]) -> float:
    import math

    if gate == "softmax":
        return math.exp(v) / sum(math.exp(o) for o in row)
    return 1 / (1 + math.exp(-v)) if gate == "sigmoid" else math.sqrt(math.log1p(math.exp(v)))


def naive_choice(row: list[float], k: int, gate: str, bias: list[float], groups: int, top_groups: int) -> set[int]:
    """The choice among those that are there."""
    here = [e for e in range(len(row)) if row[e] > float("-inf")]
    score = {e: naive_score(row[e], gate, [row[o] for o in here]) + bias[e] for e in here}
    size = len(row) // groups
    members = [[e for e in here if e // size == g] for g in range(groups)]
    value = {g: sum(sorted((score[e] for e in m), reverse=True)[:2]) for g, m in enumerate(members) if m}
    kept = sorted(value, key=lambda g: -value[g])[:top_groups] if groups > 1 else list(value)
    return set(sorted((e for g in kept for e in members[g]), key=lambda e: -score[e])[:k])


@settings(deadline=None, max_examples=60)
@given(some_logits, st.sampled_from(GATES), st.booleans(), st.booleans(), st.sampled_from([(1, 1), (2, 1), (3, 2)]))
def test_an_expert_at_minus_infinity_is_not_there(
    draw: torch.Generator, gate: str, normalize: bool, biased: bool, groups: tuple[int, int]
) -> None:
    """Never chosen for its bias while another is left; weights and their gradients as if it did not exist."""
    k, experts = 2, 6
    z = masked_logits(draw, 7, experts, 3).requires_grad_()
    bias = 5 * torch.randn(experts, generator=draw, dtype=torch.float64) if biased else None
    routing = route(
        z, k, gate=gate, normalize=normalize, selection_bias_E=bias, num_groups=groups[0], top_groups=groups[1]
    )
    factor = torch.randn(7, k, generator=draw, dtype=torch.float64)
    (routing.weights_TK * factor).sum().backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    other = z.detach().clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for t, row in enumerate(z.tolist()):
        want = naive_choice(row, k, gate, [0.0] * experts if bias is None else bias.tolist(), *groups)
        chosen = routing.expert_ids_TK[t].tolist()
        there = {e for e in chosen if row[e] > float("-inf")}
        assert there == want
        here = [e for e in range(experts) if row[e] > float("-inf")]
        value = {e: other[t, e] for e in here}
        if gate == "softmax":
            s = {e: v.exp() / sum(o.exp() for o in value.values()) for e, v in value.items()}
        elif gate == "sigmoid":
            s = {e: v.sigmoid() for e, v in value.items()}
        else:
            s = {e: v.exp().log1p().sqrt() for e, v in value.items()}
        norm = sum(s[e] for e in there) if normalize else 1.0
        for i, e in enumerate(chosen):
            weight = float((s[e] / norm).detach()) if e in there else 0.0
            assert float(routing.weights_TK[t, i].detach()) == pytest.approx(weight, abs=1e-9)
            if e in there:
                total = total + factor[t, i] * s[e] / norm
    total.backward()
    assert other.grad is not None
    assert torch.allclose(z.grad, other.grad.nan_to_num(), atol=1e-9)


@pytest.mark.parametrize("bias", [None, torch.zeros(3)])
def test_a_token_that_may_choose_nothing_is_refused(bias: Tensor | None) -> None:
    z = torch.tensor([[0.0, 1.0, 2.0], [float("-inf")] * 3])
    with pytest.raises(InputError, match="-inf for all of them in 1 of 2 tokens"):
        route(z, 1, selection_bias_E=bias)


class Given(nn.Module):
    """A router without parameters: logits, weights and choices are what it is told."""

    def forward(self, z: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = z.softmax(dim=-1).gather(-1, ids.clamp(min=0)) * (ids >= 0)
        return z, scores / scores.sum(dim=-1, keepdim=True).clamp(min=1e-20), ids


class Told(nn.Module):
    """Its logits are a parameter, and its choices are set from outside."""

    def __init__(self, z: Tensor, ids: Tensor) -> None:
        super().__init__()
        self.z, self.hidden = nn.Parameter(z.masked_fill(z == float("-inf"), 0.0)), z == float("-inf")
        self.ids, self.router, self.block = ids, Given(), Block(nn.Identity()).double()

    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> Tensor:
        _, weights, ids = self.router(self.z.masked_fill(self.hidden, float("-inf")), self.ids)
        return self.block.mixed(x, weights, ids)


@settings(deadline=None, max_examples=25)
@given(some_logits, st.sampled_from(["micro_batch", "sequence", "document"]), st.booleans())
def test_dropped_choices_are_no_load(draw: torch.Generator, scope: str, masks: bool) -> None:
    """Counts, f, P, MaxVio, the value and the push, per sequence and per document too; no index goes wrong."""
    tokens = 12
    z = masked_logits(draw, tokens, E, 2) if masks else torch.randn(tokens, E, generator=draw, dtype=torch.float64)
    ids = z.topk(2, dim=-1).indices
    ids = ids.masked_fill(torch.rand(tokens, 2, generator=draw) < 0.4, -1)
    x = torch.randn(2, tokens // 2, D, generator=draw, dtype=torch.float64)
    documents = torch.tensor([[0, 1, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2]])
    model = Told(z, ids)
    groups = {
        "micro_batch": [range(12)],
        "sequence": [range(6), range(6, 12)],
        "document": [range(2), range(2, 6), range(6, 9), range(9, 12)],
    }[scope]
    got, metrics, load = pushed(model, model.z, x, lambda c: [AuxLoss(scope, c)], position_ids=documents)
    leaf = model.z.detach().clone().requires_grad_()
    loss, counts = naive_law(leaf.masked_fill(model.hidden, float("-inf")), ids.tolist(), "softmax", groups)
    loss.backward()
    assert leaf.grad is not None
    assert load[0].tolist() == counts
    assert metrics["balance/policy_0/loss"] == pytest.approx(float(loss.detach()), rel=1e-9)
    assert torch.allclose(got, leaf.grad, atol=1e-10)
    assert metrics["balance/tokens"] == tokens
    if sum(counts):
        assert metrics["balance/maxvio_global"] == pytest.approx(max(counts) * E / sum(counts) - 1)


def test_weights_at_dropped_choices_are_left_as_they_were() -> None:
    model, router = model_of("dropped choices")
    Balancer(model, [AuxLoss("micro_batch", 0.1)], example={"x": X})
    taken = []
    router.register_forward_hook(lambda _module, _args, output: taken.append(output))  # behind the balancer's
    model(X)
    assert router.seen is not None
    assert torch.equal(taken[-1][1], router.seen[1])
    assert taken[-1][2] is router.seen[2]
    assert (taken[-1][2] == -1).any()


@pytest.mark.parametrize("gate", GATES)
def test_all_policies_at_once_stay_finite_with_masked_logits(gate: str) -> None:
    model, router = model_of("mask shown", gate)
    policies = [AuxLoss("global_batch", 0.1), AuxLoss("sequence", 0.1), ZLoss(1e-2), BIAS]
    balancer = Balancer(model, policies, example={"x": X}, measure_estimators=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        balancer.tap(model(X).square().mean()).backward()
        assert router.linear.weight.grad is not None
        assert router.linear.weight.grad.isfinite().all()
        optimizer.step()
        optimizer.zero_grad()
    assert balancer.load()[0][E - 1] == 0  # although its bias is the highest by now
    assert all(value == value for value in balancer.metrics().values())


@pytest.mark.parametrize("gate", GATES)
def test_the_z_loss_of_masked_logits_is_that_of_the_others(gate: str) -> None:
    model, router = model_of("mask shown", gate)
    got, _, _ = pushed(model, router.linear.weight, X, lambda c: [ZLoss(c)])
    weight = router.linear.weight.detach().clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for row in X.flatten(0, 1) @ weight.T:
        total = total + row[: E - 1].exp().sum().log().square()
    (total / 32).backward()
    assert weight.grad is not None
    assert torch.allclose(got, weight.grad, atol=1e-10)


# ---------------------------------------------------------------- routers without parameters


class Choose(nn.Module):
    def forward(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        weights, ids = logits.softmax(dim=-1).topk(k, dim=-1)
        return logits, weights / weights.sum(dim=-1, keepdim=True), ids


class Beside(Block):
    """The gate lies in the block; ``by_name``: its router gets the logits as a keyword."""

    def __init__(self, by_name: bool) -> None:
        super().__init__(Choose())
        self.gate, self.by_name = nn.Linear(D, E, bias=False), by_name

    def forward(self, x: Tensor) -> Tensor:
        z = self.gate(x)
        _, weights, ids = self.router(logits=z, k=2) if self.by_name else self.router(z, 2)
        return x + self.mixed(x, weights, ids)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("scope", ["micro_batch", "sequence"])
def test_a_router_without_parameters_is_pushed_by_the_law(by_name: bool, scope: Any) -> None:
    torch.manual_seed(0)
    model = Chain(Beside(by_name)).double()
    gate = model.blocks[0].gate
    got, _, _ = pushed(model, gate.weight, X, lambda c: [AuxLoss(scope, c), STILL])
    ids = (X @ gate.weight.T).topk(2, dim=-1).indices
    groups = [range(16), range(16, 32)] if scope == "sequence" else None
    want = naive_push(X, gate.weight, ids_of(ids), "softmax", groups)
    assert float((got - want).norm() / want.norm()) < 1e-10


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_the_gate_of_a_router_without_parameters_is_told_also_from_close_logits(scale: float) -> None:
    class Sigmoid(nn.Module):
        def forward(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
            weights, ids = logits.sigmoid().topk(k, dim=-1)
            return logits, weights / weights.sum(dim=-1, keepdim=True), ids

    from equipoise.external.discovery import find_external_routers

    for router, gate in ((Choose(), "softmax"), (Sigmoid(), "sigmoid")):
        block = Beside(by_name=False)
        block.router = router
        torch.nn.init.normal_(block.gate.weight, std=scale)
        ((_, found),) = find_external_routers(Chain(block), {"x": X.float()})
        assert found.gate == gate


def test_a_frozen_gate_beside_its_router_is_no_error() -> None:
    model = Chain(Beside(by_name=False)).double()
    model.requires_grad_(False)
    with pytest.warns(UserWarning, match="frozen"):
        Balancer(model, [AuxLoss("micro_batch", 0.1)], example={"x": X})


def test_a_model_without_any_parameters_is_refused_in_words() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ConfigError, match=re.escape("docs/own-router.md")):
        Balancer(Chain(Nothing()), [AuxLoss()], example={"x": X})
