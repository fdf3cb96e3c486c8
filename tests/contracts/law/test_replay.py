"""Replayed routing (R2, R3): recorded experts are dispatched and counted, live scores weigh them, no bias moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from contracts.law._model import Micro, cut, gradients, loss_of, make_step, net, train_step
from contracts.law._reference import naive_probs, naive_scores, naive_select
from equipoise import (
    AuxLoss,
    Balancer,
    ExpertBias,
    Router,
    RoutingRecord,
    StateError,
    TokenLayout,
    ZLoss,
    record_routing,
    replay_routing,
)

COEF = 0.3
GATES: list[dict[str, Any]] = [
    {"gate": "softmax"},
    {"gate": "softmax", "normalize": False, "scale": 2.5},
    {"gate": "sigmoid", "scale": 2.5, "num_groups": 3, "top_groups": 2, "selection_bias": True},
    {"gate": "sqrt_softplus", "normalize": False},
]


def drawn_ids(tokens: int, experts: int, top_k: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, experts, generator=draw).topk(top_k).indices


@pytest.mark.parametrize("form", GATES, ids=lambda form: "-".join(map(str, form.values())))
def test_weights_loads_and_gradients_are_those_of_loops(form: dict[str, Any]):
    """Two micro-batches with padding; loss = mean over them of sum(w * c) + COEF * E * mean_t <f, p_t>, f recorded."""
    torch.manual_seed(0)
    router = Router(6, 9, 3, **form).double()
    weight = router.weight.detach().clone().requires_grad_()
    balancer = Balancer(router, [AuxLoss("micro_batch", COEF), *[ExpertBias()] * ("selection_bias" in form)])
    micros = [(torch.randn(10, 6).double(), torch.rand(10) < 0.7, torch.randn(10, 3).double()) for _ in range(2)]
    record = RoutingRecord({"": [drawn_ids(10, 9, 3, seed) for seed in range(2)]})
    loads, missed, valid, expected = [0] * 9, 0, 0, torch.zeros((), dtype=torch.float64)
    with replay_routing(router, record):
        for call, (x_TD, mask_T, factor_TK) in enumerate(micros):
            routing = router(x_TD, TokenLayout(2, mask_T))
            (balancer.tap((routing.weights_TK * factor_TK).sum()) / 2).backward()
            z_TE, counts, of_p = x_TD @ weight.T, [0] * 9, torch.zeros(9, dtype=torch.float64)
            s_TE, p_TE = naive_scores(z_TE, form["gate"]), naive_probs(z_TE, form["gate"])
            for t in range(10):
                ids = record.ids[""][call][t].tolist()
                own = torch.stack([s_TE[t, e] for e in ids])
                total = own.sum() if form.get("normalize", True) else 1.0
                w_K = form.get("scale", 1.0) * own / total
                torch.testing.assert_close(routing.weights_TK[t], w_K, rtol=1e-12, atol=0)
                expected = expected + (w_K * factor_TK[t]).sum() / 2
                if mask_T[t]:
                    live = naive_select(s_TE[t].tolist(), 3, form.get("num_groups", 1), form.get("top_groups", 1))
                    missed, valid, of_p = missed + len(set(ids) - live), valid + 1, of_p + p_TE[t]
                    for e in ids:
                        counts[e] += 1
            tokens = int(mask_T.sum())
            f_E = torch.tensor(counts).double() / (3 * tokens)
            expected = expected + COEF * 9 * (f_E * of_p / tokens).sum() / 2
            loads = [one + more for one, more in zip(loads, counts, strict=True)]
            assert routing.counts_E.tolist() == counts
    expected.backward()
    torch.testing.assert_close(router.weight.grad, weight.grad, rtol=1e-9, atol=1e-12)
    balancer.step()
    assert balancer.load()[0].tolist() == loads
    assert balancer.metrics()["balance/replay_gap"] == pytest.approx(missed / (3 * valid), rel=1e-12)
    assert missed > 0 and (router.expert_bias is None or not router.expert_bias.any())


POLICIES = [AuxLoss("global_batch", COEF), AuxLoss("sequence", COEF), ZLoss(0.1)]


def run(mode: str, record: RoutingRecord | None, policies: list[Any] = POLICIES) -> dict[str, Any]:
    model = net(mode=mode, gate="sigmoid")
    balancer, optimizer = Balancer(model, policies), torch.optim.SGD(model.parameters(), lr=0.05)
    step = make_step(0, micro_batches=2, masked=True)
    if record is None:
        found = train_step(model, balancer, optimizer, step)
    else:
        with replay_routing(model, record):
            found = train_step(model, balancer, optimizer, step)
    metrics = balancer.metrics()
    assert metrics.get("balance/recompute_flips", 0) == 0
    return {"gradients": found, "loads": balancer.load(), "metrics": metrics}


def recorded(seed: int, step: list[Micro] | None = None, **options: Any) -> RoutingRecord:
    model = net(seed, **({"gate": "sigmoid"} | options))
    with record_routing(model) as record, torch.no_grad():
        for micro in make_step(0, micro_batches=2, masked=True) if step is None else step:
            loss_of(model, micro)
    return record


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert all(torch.equal(one["gradients"][name], grad) for name, grad in other["gradients"].items())
    assert all(torch.equal(a, b) for a, b in zip(one["loads"], other["loads"], strict=True))


def test_a_replay_of_its_own_record_changes_no_bit():
    plain, again = run("plain", None), run("plain", recorded(0))
    assert_same(plain, again)
    gaps = {name for name in again["metrics"] if name.endswith("replay_gap")}
    assert {again["metrics"].pop(name) for name in gaps} == {0.0} and len(gaps) == 3
    assert plain["metrics"] == again["metrics"]


@pytest.mark.parametrize("mode", ["non_reentrant", "reentrant"])
def test_a_recompute_replays_what_its_forward_was_given(mode: str):
    record = recorded(1)
    plain, again = run("plain", record), run(mode, record)
    assert_same(plain, again)
    assert plain["metrics"]["balance/replay_gap"] == again["metrics"]["balance/replay_gap"] > 0.1


@pytest.mark.parametrize("mode", ["non_reentrant", "reentrant"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_recomputes_of_several_forwards_in_any_order(mode: str, order: tuple[int, ...]):
    """As pipelines do; three batches of one shape, whose recompute does not say which it is."""
    step = make_step(0, micro_batches=3)
    record, found = recorded(1, step), []
    for one in (mode, "plain"):
        model = net(mode=one, gate="sigmoid")
        with replay_routing(model, record):
            losses = [loss_of(model, micro) for micro in step]
            for i in order:
                losses[i].backward()
        found.append(gradients(model))
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


def test_a_record_in_bf16_is_dispatched_and_the_gap_is_the_naive_count():
    step, options = make_step(0, micro_batches=2, sequences=4, length=64), {"experts": (16, 16), "top_k": (4, 4)}
    rollout = net(0, dtype=torch.bfloat16, **options)
    with record_routing(rollout) as record, torch.no_grad():
        for micro in step:
            rollout(micro.x_BSD.bfloat16())
    model = net(0, **options)
    balancer = Balancer(model, [AuxLoss("global_batch", 1e-2)])
    dispatched: dict[str, list[Any]] = {name: [] for name in record.ids}
    for name, router in balancer.routers.items():
        router.register_forward_hook(lambda _module, _args, routing, name=name: dispatched[name].append(routing))
    with replay_routing(model, record):
        for micro in step:
            (balancer.tap(loss_of(model, micro)) / 2).backward()
    balancer.step()
    for layer, (name, calls) in enumerate(dispatched.items()):
        missed = 0
        for ids_TK, routing in zip(record.ids[name], calls, strict=True):
            assert ids_TK.dtype == torch.int16 and torch.equal(ids_TK.long(), routing.expert_ids_TK)
            for ids, scores in zip(ids_TK.tolist(), routing.logits_TE.tolist(), strict=True):
                missed += len(set(ids) - naive_select(scores, 4))
        counts_E = torch.bincount(torch.cat(record.ids[name]).flatten().long(), minlength=16)
        assert torch.equal(balancer.load()[layer], counts_E)
        assert balancer.metrics()[f"balance/layer_{layer:02d}/replay_gap"] == missed / (2 * 4 * 64 * 4) > 0


@pytest.mark.parametrize("rule", ["sign", "momentum", "quantile"])
def test_no_bias_moves_in_a_step_with_a_replay(rule: str):
    """B31. One of two micro-batches is replayed; then a step without, and the bias moves as if the other was not."""
    step, found = make_step(0, micro_batches=2), []
    for replays in (True, False):
        model = net(gate="sigmoid")
        balancer = Balancer(model, [ExpertBias(rule) if rule == "quantile" else ExpertBias(rule, rate=0.01)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        if replays:
            loss_of(model, step[0]).backward()
            with replay_routing(model, recorded(1, step[1:])):
                loss_of(model, step[1]).backward()
            optimizer.step()
            assert not any(router.expert_bias.any() for router in balancer.routers.values())
            assert not any(one.any() for group in balancer._groups for one in group.momentum.values())
            assert "no bias moved" in " ".join(balancer.describe().split())
        train_step(model, balancer, optimizer, step)
        assert "no bias moved" not in " ".join(balancer.describe().split())
        found.append([router.expert_bias.clone() for router in balancer.routers.values()])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*found, strict=True))


def test_a_counting_pass_has_a_context_of_its_own():
    record, found = recorded(1), []
    for scope in ({"estimator": "exact"}, {"estimator": "filled"}):
        model = net(gate="sigmoid")
        balancer = Balancer(model, [AuxLoss("global_batch", COEF, **scope)])
        step = make_step(0, micro_batches=2, masked=True)
        if balancer.needs_counting:
            with balancer.counting(), replay_routing(model, record):
                for micro in step:
                    model(micro.x_BSD, micro.mask_BS)
        else:  # one pass of the whole batch knows the whole load
            step, record = cut(step, 1), joined(record)
        with replay_routing(model, record):
            for micro in step:
                (balancer.tap(loss_of(model, micro)) / len(step)).backward()
        found.append(gradients(model))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*(f.values() for f in found), strict=True))


def joined(record: RoutingRecord) -> RoutingRecord:
    return RoutingRecord({name: [torch.cat(calls)] for name, calls in record.ids.items()})


def test_evaluation_counts_the_gap_and_a_token_without_a_record_goes_its_way():
    step = make_step(0)
    model, record = net(gate="sigmoid").eval(), recorded(1, step)
    for calls in record.ids.values():
        calls[0][3:] = -1
    balancer = Balancer(model, [])
    with balancer.evaluation() as found, replay_routing(model, record), torch.no_grad():
        first = model.blocks[0].gate.register_forward_hook(lambda _m, _a, routing: ids.append(routing.expert_ids_TK))
        ids: list[Tensor] = []
        loss_of(model, step[0])
        first.remove()
    with record_routing(model) as live, torch.no_grad():
        loss_of(model, step[0])
    name = "blocks.0.gate"
    assert torch.equal(ids[0][3:], live.ids[name][0][3:].long())
    assert torch.equal(ids[0][:3], record.ids[name][0][:3].long())
    pairs = zip(record.ids[name][0][:3].tolist(), live.ids[name][0][:3].tolist(), strict=True)
    missed = sum(len(set(one) - set(other)) for one, other in pairs)
    assert found["balance/layer_00/replay_gap"] == pytest.approx(missed / 6, rel=1e-12)
    assert found["balance/tokens"] == 10


@pytest.mark.filterwarnings("ignore")  # torch's own, about its own compiler
def test_a_compiled_model_replays():
    small, step = {"experts": (5,), "top_k": (2,)}, make_step(0, masked=True)
    record, found = recorded(1, step, **small), []
    for compiled in (False, True):
        model = net(gate="sigmoid", **small)
        balancer = Balancer(model, [AuxLoss("sequence", COEF)])
        runs: Any = torch.compile(model, backend="aot_eager") if compiled else model
        balancer.tap(loss_of(runs, step[0])).backward()  # it was compiled before
        balancer.step()
        model.zero_grad()
        with replay_routing(runs, record):
            balancer.tap(loss_of(runs, step[0])).backward()
        balancer.step()
        found.append({"gradients": gradients(model), "loads": balancer.load()})
    assert_same(*found)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # reentrant under no_grad
def test_a_recompute_after_the_context_is_an_error_and_a_plain_backward_is_none():
    step = make_step(0)
    record = recorded(1, step)
    for mode in ("plain", "non_reentrant", "reentrant"):
        model = net(mode=mode, gate="sigmoid")
        with replay_routing(model, record):
            loss = loss_of(model, step[0])
        if mode == "plain":
            loss.backward()
        else:
            with pytest.raises(StateError, match="backward inside replay_routing"):
                loss.backward()
        with record_routing(model) as live, torch.no_grad():  # the next forward chooses by itself
            loss_of(model, step[0])
        assert not any(torch.equal(live.ids[name][0], record.ids[name][0]) for name in live.ids)
        assert all(router.gate.routing_calls is None for router in model.blocks)
        model.zero_grad()
        loss_of(model, step[0]).backward()


@pytest.mark.parametrize("mode", ["non_reentrant", "reentrant"])
def test_a_recompute_of_an_earlier_context_takes_nothing_of_the_next(mode: str):
    """A context for each micro-batch: backward of both at the end is an error, of each inside its own what it was."""
    step = make_step(0, micro_batches=2)
    records, found = [recorded(1, [micro]) for micro in step], []
    model = net(mode=mode, gate="sigmoid")
    with replay_routing(model, records[0]):
        first = loss_of(model, step[0])
    with replay_routing(model, records[1]):
        second = loss_of(model, step[1])
        with pytest.raises(StateError, match="backward inside replay_routing"):
            (first + second).backward()
    for one in (mode, "plain"):
        model = net(mode=one, gate="sigmoid")
        for micro, record in zip(step, records, strict=True):
            with replay_routing(model, record):
                loss_of(model, micro).backward()
        found.append(gradients(model))
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # reentrant under no_grad
@pytest.mark.parametrize("mode", ["non_reentrant", "reentrant"])
def test_a_live_forward_may_be_recomputed_after_a_replay(mode: str):
    step, found = make_step(0, micro_batches=2), []
    for one in (mode, "plain"):
        model = net(mode=one, gate="sigmoid")
        live = loss_of(model, step[0])
        with replay_routing(model, recorded(1, [step[1]])), torch.no_grad():
            loss_of(model, step[1])
        live.backward()
        found.append(gradients(model))
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


@pytest.mark.parametrize("mode", ["non_reentrant"])
def test_a_second_backward_after_the_context_is_an_error_too(mode: str):
    step = make_step(0)
    model, record = net(mode=mode, gate="sigmoid"), recorded(1, step)
    with replay_routing(model, record):
        loss = loss_of(model, step[0])
        loss.backward(retain_graph=True)
    with pytest.raises(StateError, match="backward inside replay_routing"):
        loss.backward()
    held = [one.ids_TK.untyped_storage().nbytes() for block in model.blocks for one in block.gate.routing_calls.before]
    assert held and not any(held), "a record that is over is not kept alive"
