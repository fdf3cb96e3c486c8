"""One global batch, cut and run in every way: plain, recomputed, compiled, with passes in between: the same numbers."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch

from _named import named
from contracts.law._model import (
    Micro,
    Net,
    assert_close,
    aux,
    cut,
    gradients,
    loss_of,
    make_step,
    net,
    policy,
    rounding,
    train_step,
)
from equipoise import Balancer, ExpertBias
from equipoise.autograd.balance_gradient import attach_balance_gradient
from equipoise.autograd.router_state import RouterState
from equipoise.autograd.spec import LossTerm, StatsSpec
from equipoise.autograd.token_layout import TokenLayout
from equipoise.functional.routing import count_choices

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # reentrant under no_grad

INVARIANT = [
    aux("sequence"),
    aux("document"),
    aux("sequence", counts="unbiased"),
    aux("global_batch", estimator="previous"),
    aux("global_batch", estimator="ema", decay=0.7),
    {"kind": "z", "coef": 0.1},
]
ORACLE = [*INVARIANT, aux("global_batch", estimator="exact")]
BY_THE_CUT = [aux("micro_batch"), aux("global_batch"), aux("sequences", n=3), aux("data_parallel")]
RECOMPUTED = ["reentrant", "non_reentrant", "selective"]


def no_grad_passes(model: Any, m: int) -> None:
    """A reference-model pass in training mode, and an evaluation: neither may leave a trace (B24, B25, B26, B28)."""
    if m > 0:
        return
    other = make_step(77, sequences=3, documents=True)[0]
    with torch.no_grad():
        loss_of(model, other)
        model.eval()
        loss_of(model, other)
        model.train()


def run(
    policies: list[dict],
    steps: list[list[Micro]],
    *,
    mode: str = "plain",
    compiled: str = "",
    passes: bool = False,
    **options: Any,
) -> tuple[list[dict[str, torch.Tensor]], list[list[list[int]]], list[dict[str, float]], Net]:
    """Trains through ``steps`` and returns gradients, loads and metrics of each."""
    model = net(mode=mode, gate="sigmoid", **options)
    bias = [ExpertBias(rule="sign", rate=0.01)]
    balancer = Balancer(model, named([*(policy(d) for d in policies), *bias]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    runnable = compile_it(model, compiled) if compiled else model
    found: tuple[list, list, list] = ([], [], [])
    for step in steps:
        if passes:
            no_grad_passes(runnable, 0)
        between = functools.partial(_between, balancer, runnable) if passes else None
        found[0].append(train_step(runnable, balancer, optimizer, step, between=between))
        found[1].append([counts.tolist() for counts in balancer.load()])
        found[2].append(balancer.metrics())
    return *found, model


def _between(balancer: Balancer, model: Any, m: int) -> None:
    no_grad_passes(model, m)
    with torch.no_grad():
        balancer.tap(loss_of(model, make_step(78, documents=True)[0]))  # an evaluation that shares the loss function


def compile_it(model: Net, how: str) -> Any:
    torch._dynamo.reset()
    if how == "blocks":  # compiled blocks inside an eager checkpoint
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
        return model
    return torch.compile(model, fullgraph=True, backend=how)


def steps(cut_into: int, documents: bool = True, masked: bool = False) -> list[list[Micro]]:
    return [cut(make_step(s, 1, 16, 3, documents=documents, masked=masked), cut_into) for s in range(3)]


@functools.cache
def whole_batch(exact: bool):
    return run(ORACLE if exact else INVARIANT, steps(1))


@pytest.mark.parametrize(
    ("mode", "micro_batches"),
    [*((mode, m) for mode in ("plain", *RECOMPUTED) for m in (1, 4)), ("plain", 16), ("reentrant", 16)],
)
def test_any_cut_in_any_mode_is_one_big_batch(mode, micro_batches):
    """The invariance law: nobody passes 1/M (B01, B04, B07, B10), recompute counts once (B20 to B24)."""
    grads, loads, metrics, model = run(ORACLE, steps(micro_batches), mode=mode, passes=True)
    whole_grads, whole_loads, whole_metrics, whole_model = whole_batch(True)
    assert loads == whole_loads
    for got, expected in zip(grads, whole_grads, strict=True):
        assert_close(got, expected, 1e-5)
    for block, other in zip(model.blocks, whole_model.blocks, strict=True):  # B44: once per step, not per micro-batch
        assert torch.equal(block.gate.expert_bias, other.gate.expert_bias)
        assert block.gate.expert_bias.abs().max() > 0.01
    keys = ["balance/tokens", "balance/maxvio_global", "balance/maxvio_sequence", "balance/topk_score"]
    keys += [f"balance/policy_{i}/{what}" for i in range(len(ORACLE)) for what in ("loss", "gradient_ratio")]
    for got, expected in zip(metrics, whole_metrics, strict=True):
        assert {k: got[k] for k in keys} == pytest.approx({k: expected[k] for k in keys}, rel=1e-4)


@pytest.mark.parametrize("mode", RECOMPUTED)
def test_recompute_is_bit_equal_for_every_scope(mode):
    """B20 to B24: whatever the scope means, recomputing it changes no bit of gradients, loads or values."""
    every = [*INVARIANT, *BY_THE_CUT]
    plain = run(every, steps(4, masked=True), passes=True)
    again = run(every, steps(4, masked=True), mode=mode, passes=True)
    assert again[1] == plain[1]
    for got, expected in zip(again[0], plain[0], strict=True):
        assert all(torch.equal(got[n], expected[n]) for n in expected)
    for got, expected in zip(again[2], plain[2], strict=True):
        assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("mode", "how"),
    [
        ("plain", "aot_eager"),
        ("non_reentrant", "aot_eager"),
        ("reentrant", "aot_eager"),
        ("reentrant", "blocks"),
        ("plain", "aot_eager_decomp_partition"),
    ],
)
def test_compiled_equals_plain(mode, how):
    """torch.compile(fullgraph=True), alone and with recompute inside or around it: late writes reach the graph."""
    every = [*INVARIANT[:3], aux("global_batch"), aux("sequences", n=3)]
    short = [cut(make_step(s, 1, 4, 4, documents=True), 2) for s in range(2)]
    small: dict[str, Any] = {"experts": (5,), "top_k": (2,)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own compiler
        compiled = run(every, short, mode=mode, compiled=how, passes=mode != "plain", **small)
    plain = run(every, short, **small)
    bound = rounding(short[0], gate="sigmoid", **small)  # one of them takes sums apart in another order
    assert compiled[1] == plain[1]
    for got, expected in zip(compiled[0], plain[0], strict=True):
        assert_close(got, expected, bound)
    for got, expected in zip(compiled[2], plain[2], strict=True):
        assert got == pytest.approx(expected, rel=bound)


def test_inductor_equals_plain():
    """The default backend moves what it can into the forward graph; the pressure must not be among it."""
    short = [cut(make_step(s, 1, 2, 4), 2) for s in range(2)]
    small: dict[str, Any] = {"experts": (4,), "top_k": (1,)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = run([aux("global_batch")], short, compiled="inductor", **small)
    plain = run([aux("global_batch")], short, **small)
    assert compiled[1] == plain[1]
    for got, expected in zip(compiled[0], plain[0], strict=True):
        assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("mode", ["plain", "reentrant", "non_reentrant", "compiled", "compiled non_reentrant"])
def test_a_gradscaler_whose_scale_changes_is_divided_out(mode):
    """B02, B09: the tap learns the factor; the balance gradient follows it like the language model's."""
    how, _, inner = mode.rpartition(" ") if " " in mode else ("compiled" if mode == "compiled" else "", "", mode)
    inner = "plain" if inner == "compiled" else inner
    model = net(mode=inner, experts=(5,), top_k=(2,))
    balancer = Balancer(model, [policy(aux("micro_batch")), policy(aux("global_batch"))])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    runnable: Any = compile_it(model, "aot_eager") if how else model
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0, growth_interval=1, growth_factor=8.0)
    step = make_step(0, 2)
    found, scales = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            scales.append(scaler.get_scale())
            for micro in step:
                scaler.scale(balancer.tap(loss_of(runnable, micro)) / 2).backward()
            scaler.unscale_(optimizer)
            found.append((gradients(model), balancer))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert scales == [4096.0, 4096.0 * 8, 4096.0 * 64]
    fresh = net(experts=(5,), top_k=(2,))
    plain = Balancer(fresh, [policy(aux("micro_batch")), policy(aux("global_batch"))])
    expected = train_step(fresh, plain, torch.optim.SGD(fresh.parameters(), lr=0.0), step)
    for got, _ in found:
        assert_close(got, expected, 1e-6)
    assert balancer.metrics() == pytest.approx(plain.metrics(), rel=1e-5)


def test_bf16_autocast_leaves_router_and_counts_alone():
    """B34, B68: logits, probabilities and counts stay in fp32 or wider, so a cut changes no count."""
    loads, grads = [], []
    for mode, count in (("plain", 1), ("plain", 4), ("non_reentrant", 4)):
        model = net(mode=mode)
        balancer = Balancer(model, [policy(aux("sequence")), ExpertBias(rule="proportional", rate=1e-3)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        seen = []
        hook = model.blocks[0].gate.register_forward_hook(lambda _m, _a, routing, seen=seen: seen.append(routing))
        for micro in cut(make_step(1, 1, 8), count):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = balancer.tap(loss_of(model, micro))
            (loss / count).backward()
        hook.remove()
        assert all(r.logits_TE.dtype == torch.float32 for r in seen)
        grads.append(gradients(model))
        optimizer.step()
        loads.append([c.tolist() for c in balancer.load()])
    assert loads[0] == loads[1] == loads[2]
    assert_close(grads[1], grads[0], 2e-2)
    assert all(torch.equal(grads[2][n], grads[1][n]) for n in grads[1])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("mode", ["backward inside", "compiled"])
def test_autocast_does_not_reach_the_push(mode):
    """Near balance q and <p, q> differ in the third digit, which bf16 does not have."""
    pushes = []
    for autocast in (False, True):
        torch.manual_seed(0)
        logits_TE = torch.randn(64, 16).requires_grad_()
        state = RouterState(StatsSpec(16, 2, "softmax", (LossTerm("deferred"),), gram=True))

        def tied(state, logits_TE):
            weights_TK, ids_TK = logits_TE.softmax(dim=-1).topk(2)
            counts_BE = count_choices(ids_TK, 16, num_sequences=4)
            return attach_balance_gradient(
                state, weights_TK, logits_TE, ids_TK, counts_BE, TokenLayout(4), training=True
            )

        run = torch.compile(tied, backend="aot_eager") if mode == "compiled" else tied
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = run(state, logits_TE).sum() * 0
            state.grad_coefs.data[:16] = 1 + 0.03 * torch.randn(16, dtype=torch.float64)
            if mode != "compiled":
                loss.backward()
        if mode == "compiled":
            loss.backward()
        pushes.append((logits_TE.grad, state.pending_grams[0]))
    for got, want in zip(pushes[1], pushes[0], strict=True):
        assert float((got - want).norm()) <= 1e-6 * float(want.norm())


def test_dropout_is_replayed_by_the_counting_pass():
    """Estimator exact under dropout: the counting pass draws what the real pass draws, so f is the step's own."""
    model = net(dropout=0.5)
    balancer = Balancer(model, [policy(aux("global_batch", estimator="exact"))], measure_estimators=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = make_step(2, 4)
    with balancer.counting():
        for micro in step:
            model(micro.x_BSD)
    counted = balancer._groups[0].counted
    assert counted is not None
    counted = counted[:, :6].clone()
    train_step(model, balancer, optimizer, step, count=False)
    assert counted.tolist() == [c.tolist() for c in balancer.load()]
