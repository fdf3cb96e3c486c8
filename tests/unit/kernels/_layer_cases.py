"""Whole layers and whole steps through the kernels, against the reference that imports nothing of equipoise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from _named import named
from contracts.law._model import (
    assert_close,
    aux,
    gradients,
    loss_of,
    make_step,
    net,
    new_history,
    policy,
    train_step,
    twin,
)
from contracts.law._reference import reference_step
from equipoise import AuxLoss, Balancer, ExpertBias, MoE, kernels
from equipoise.kernels import INTERPRETED
from equipoise.layers import router as router_module

DEVICE = "cpu" if INTERPRETED else "cuda"
POLICIES = [
    aux("micro_batch"),
    aux("sequence", counts="unbiased"),
    aux("sequences", n=2, groups=3, targets=[0.5, 0.3, 0.2]),
    aux("global_batch"),
    {"kind": "z", "coef": 0.2},
]


@pytest.fixture
def routed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one whenever a router goes through the kernels."""
    calls: list[Any] = []
    real = router_module.fused_route
    monkeypatch.setattr(router_module, "fused_route", lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


def to_device(step: list[Any]) -> list[Any]:
    return [type(m)(*(None if field is None else field.to(DEVICE) for field in m)) for m in step]


@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize(("biased", "norms"), [("", True), ("scores", False), ("multiply", False), ("logits", False)])
def test_a_step_is_the_reference_step(routed, gate, biased, norms):
    model = net(experts=(6, 9), top_k=(2, 3), gate=gate, normalize=norms, scale=1.5).to(DEVICE)
    for block in model.blocks if biased else ():
        block.gate.enable_selection_bias(biased)
        block.gate.expert_bias.copy_(0.3 * torch.randn(block.gate.num_experts))
    other = twin(model).to("cpu", torch.float64)
    described = POLICIES if biased else [d for d in POLICIES if d.get("counts") != "unbiased"]
    policies = [*map(policy, described), *([ExpertBias(rate=0.0, place=biased)] if biased else [])]
    balancer = Balancer(model, named(policies), gradient_norms=norms)
    step = make_step(1, micro_batches=2, masked=True)
    wide = make_step(1, micro_batches=2, masked=True, dtype=torch.float64)
    expected = reference_step(other, wide, loss_of, described, new_history())
    got = train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.0), to_device(step))
    assert_close({name: grad.cpu() for name, grad in got.items()}, expected.gradients, 1e-5)
    assert [counts.tolist() for counts in balancer.load()] == expected.counts
    found = balancer.metrics()
    for i, value in enumerate(expected.values):
        assert found[f"balance/policy_{i}/loss"] == pytest.approx(value, rel=1e-5)
    assert len(routed) == 4


def test_metrics_are_those_of_plain_pytorch(routed, monkeypatch):
    """Norms, MaxVio, values: the same numbers from the kernels and without them."""
    found = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(router_module, "fuses", lambda *a: False)
        model = net(experts=(6,), top_k=(2,)).to(DEVICE)
        balancer = Balancer(model, [AuxLoss("micro_batch", 0.3), AuxLoss("global_batch", 0.3)])
        train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.0), to_device(make_step(3, masked=True)))
        found.append(balancer.metrics())
    assert len(routed) == 1
    assert found[0].keys() == found[1].keys()
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-9)


def test_a_bias_of_each_micro_batch_is_left_to_plain_pytorch(routed, monkeypatch):
    found = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(router_module, "fuses", lambda *a: False)
        model = net(experts=(6,), top_k=(2,), gate="sigmoid").to(DEVICE)
        balancer = Balancer(model, [ExpertBias("proportional", 0.01, scope="micro_batch"), AuxLoss("micro_batch")])
        train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.0), to_device(make_step(3, 2)))
        found.append(model.blocks[0].gate.expert_bias)
    assert found[0].any() and torch.equal(*found)
    assert not routed


@pytest.mark.parametrize("mode", ["reentrant", "non_reentrant", "selective"])
def test_a_checkpoint_counts_once_and_pushes_alike(routed, mode):
    found = []
    for how in ("plain", mode):
        model = net(mode=how).to(DEVICE)
        balancer = Balancer(model, [AuxLoss("micro_batch", 0.3), AuxLoss("global_batch", 0.3)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        found.append((train_step(model, balancer, optimizer, to_device(make_step(2, 2))), balancer.load()))
    (plain, load), (recomputed, load_again) = found
    assert_close(recomputed, plain, 1e-6)
    assert [counts.tolist() for counts in load] == [counts.tolist() for counts in load_again]
    assert len(routed) == 4 + 8


def test_evaluation_counts_nothing_and_routes_alike(routed):
    model = net(experts=(6,), top_k=(2,)).to(DEVICE)
    balancer = Balancer(model, [AuxLoss("micro_batch", 0.3)])
    (micro,) = to_device(make_step(4))
    training = model(micro.x_BSD)
    balancer.discard()
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(micro.x_BSD), training)
    loss_of(model, micro).backward()
    leaf = model.blocks[0].gate.balance_state.grad_accumulator
    assert leaf.grad is None or not leaf.grad.any()
    assert gradients(model)
    assert len(routed) == 3


def test_who_only_looks_sees_what_plain_pytorch_sees_and_changes_no_gradient(routed, monkeypatch):
    (micro,), found = to_device(make_step(4, masked=True)), []
    for plain, looks in ((False, False), (False, True), (True, True)):
        if plain:
            monkeypatch.setattr(router_module, "fuses", lambda *a: False)
        model = net(experts=(6,), top_k=(2,)).to(DEVICE)
        balancer = Balancer(model, []) if looks else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        loss = loss_of(model, micro)
        (balancer.tap(loss) if balancer else loss).backward()
        found.append(gradients(model))
        optimizer.step()
        if balancer:
            model.eval()
            with balancer.evaluation() as seen:
                model(micro.x_BSD, micro.mask_BS)
            found.append({**balancer.metrics(), **{f"in evaluation {key}": number for key, number in seen.items()}})
    without, looked, through_kernels, _, by_pytorch = found
    assert all(torch.equal(gradient, looked[name]) for name, gradient in without.items())
    assert through_kernels == pytest.approx(by_pytorch, rel=1e-5, abs=1e-9)
    assert len(routed) == 3


def test_a_loss_on_the_logits_reaches_them():
    layer = MoE(8, 16, 4, 2).to(DEVICE)
    Balancer(layer, [AuxLoss("micro_batch", 0.3)])
    routing = layer.gate(torch.randn(5, 8, device=DEVICE))
    (got,) = torch.autograd.grad(routing.logits_TE.square().sum(), routing.logits_TE, retain_graph=True)
    torch.testing.assert_close(got, 2 * routing.logits_TE.detach())
    routing.logits_TE.square().sum().backward()
    assert layer.gate.weight.grad is not None and layer.gate.weight.grad.any()


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_bf16_tokens_agree_with_plain_pytorch(monkeypatch, parameters):
    torch.manual_seed(0)
    layer = MoE(16, 24, 6, 2).to(DEVICE, parameters)
    x = torch.randn(2, 9, 16, device=DEVICE).bfloat16()
    found = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(kernels.availability, "DEVICES", set())
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.float().square().sum().backward()
        found.append([y, leaf.grad, *(p.grad for p in layer.parameters())])
        layer.zero_grad()
    for got, expected in zip(*found, strict=True):
        error = (got.float() - expected.float()).norm() / expected.float().norm()
        assert float(error.detach()) < 0.02


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own
def test_compiled_as_one_graph_it_gives_the_same_bits():
    """The kernels are operators that a compiler sees as they are announced."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        layer = MoE(16, 24, 6, 2).to(DEVICE)
        balancer = Balancer(layer, [AuxLoss("micro_batch", 0.3), AuxLoss("global_batch", 0.3)])
        run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE).bfloat16()
        balancer.tap(run(x).float().square().mean()).backward()
        found.append([p.grad for p in layer.parameters()] + [layer.gate.balance_state.grad_accumulator.grad])
    assert all(torch.equal(got, expected) for got, expected in zip(*found, strict=True))


def test_a_step_on_a_gpu_never_waits():
    """torch itself raises there; tests/unit/kernels/test_without_gpu.py holds the same law without a GPU."""
    torch.manual_seed(0)
    layer = MoE(16, 24, 6, 2).to(DEVICE, torch.bfloat16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    balancer = Balancer(layer, [AuxLoss("micro_batch", 0.3), AuxLoss("global_batch", 0.3)], optimizer=optimizer)
    x = torch.randn(2, 8, 16, device=DEVICE).bfloat16()
    for mode in ("default", "error"):  # the first step compiles
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode(mode)
        balancer.tap(layer(x).float().square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    assert int(balancer.load()[0].sum()) == 2 * 16
