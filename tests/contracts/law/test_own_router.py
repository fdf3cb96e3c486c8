"""How a router of one's own is read: by its shapes, as registered, or refused with the line that helps."""

from __future__ import annotations

import dataclasses
import re
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equipoise
from contracts.law._external import Block, Chain, D, E, Gate, ids_of, naive_push, pushed
from equipoise import AuxLoss, Balancer, ConfigError, ExpertBias, register_router
from equipoise.external.output_formats import parse_output
from equipoise.external.registry import REGISTERED

ROOT = Path(__file__).resolve().parents[3]
X = torch.randn(2, 16, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BIAS = ExpertBias(rule="proportional", rate=0.0)
CONTRACT = "returns logits (T, E), weights (T, K) and expert ids (T, K)"
Named = namedtuple("Named", "logits weights ids")


@dataclasses.dataclass(frozen=True)
class Routed:
    logits: Tensor
    weights: Tensor
    ids: Tensor
    loss: float = 0.0


@pytest.fixture(autouse=True)
def registered():
    """What a test registers is forgotten."""
    before = dict(REGISTERED)
    yield
    REGISTERED.clear()
    REGISTERED.update(before)


def check(model: Chain, scope: str = "sequence", policies: Any = (BIAS,), **call: Any) -> dict:
    """The push on the first gate is that of the loop."""
    weight = model.blocks[0].router.linear.weight
    got, metrics, _ = pushed(model, weight, X, lambda c: [AuxLoss(scope, c), *policies], **call)
    ids = (X @ weight.T).topk(2, dim=-1).indices
    want = naive_push(X, weight, ids_of(ids), "softmax", [range(16), range(16, 32)])
    assert float((got - want).norm() / want.norm()) < 1e-10
    return metrics


def model_of(router: nn.Module, take: Any) -> Chain:
    torch.manual_seed(0)
    return Chain(Block(router, take)).double().train()


# ---------------------------------------------------------------- read without a word

OUTPUTS = {
    "dict": (lambda z, w, i: {"logits": z, "weights": w, "indices": i}, lambda o: (o["weights"], o["indices"])),
    "dataclass": (lambda z, w, i: Routed(z, w, i), lambda o: (o.weights, o.ids)),
    "named tuple": (lambda z, w, i: Named(z, w, i), lambda o: (o.weights, o.ids)),
    "list": (lambda z, w, i: [w, i, z], lambda o: (o[0], o[1])),
    "flat": (lambda z, w, i: tuple(x.flatten(0, 1) for x in (z, w, i)), lambda o: o[1:]),
    "int32": (lambda z, w, i: (i.int(), w, z), lambda o: (o[1], o[0])),
    "mixed": (lambda z, w, i: (z, w.flatten(0, 1), i.flatten(0, 1)), lambda o: o[1:]),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_parts_are_found_whatever_holds_them(kind: str) -> None:
    """(B, S, .) and (T, .), tuples, dicts and dataclasses, and an output of the same kind goes on."""
    made, take = OUTPUTS[kind]
    kinds = []

    class Other(Gate):
        def output(self, z: Tensor, weights: Tensor, ids: Tensor) -> Any:
            return made(z, weights, ids)

    def taken(output: Any) -> Any:
        kinds.append((type(output), take(output)[1].dtype))
        return take(output)

    check(model_of(Other(), taken))
    assert len(set(kinds)) == 1


@pytest.mark.parametrize("first", [True, False])
def test_with_k_equal_to_e_the_logits_are_what_the_weights_follow_from(first: bool) -> None:
    class Dense(Gate):
        def output(self, z: Tensor, weights: Tensor, ids: Tensor) -> Any:
            return (z, weights, ids) if first else (weights, z, ids)

    model = model_of(Dense(k=E), lambda o: (o[1] if first else o[0], o[2]))
    balancer = Balancer(model, [AuxLoss("micro_batch", 1.0)], example={"x": X})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    balancer.tap(model(X).square().mean()).backward()
    optimizer.step()
    assert balancer.load()[0].tolist() == [32] * E
    assert balancer.metrics()[f"balance/{balancer.schedule.names[0]}/gradient_ratio"] == pytest.approx(0.0, abs=1e-9)


def test_with_k_equal_to_e_two_that_follow_from_each_other_are_refused_with_a_line() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, 2, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            p = self.linear(x).softmax(dim=-1)
            return (p, *p.sort(dim=-1, descending=True))

    model = model_of(Two(), lambda o: o[1:])
    with pytest.raises(ConfigError, match="K = E = 2: each of the two follows from the other") as caught:
        Balancer(model, [AuxLoss("micro_batch", 1.0)], example={"x": X})
    exec(caught.value.do, {"equipoise": equipoise, "Two": Two})
    Balancer(model, [AuxLoss("micro_batch", 1.0)], example={"x": X})


def test_integers_that_are_no_experts_are_passed_over() -> None:
    assert parse_output(nn.Identity(), (), {}, {"ids": torch.randint(9, (2, 5)), "mask": torch.rand(2, 5)}) is None

    class Batch(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return torch.full((4, 3), 1000), torch.rand(4, 3), torch.rand(4, 9)

    class Both(Block):
        def __init__(self) -> None:
            super().__init__(Gate())
            self.batch = Batch()

        def forward(self, x: Tensor) -> Tensor:
            self.batch(x)
            return super().forward(x)

    torch.manual_seed(0)
    check(Chain(Both()).double())


# ---------------------------------------------------------------- registered


class MoEGate(Gate):
    """DeepSeek's and HiDream's: (ids, weights, aux loss)."""

    def output(self, z: Tensor, weights: Tensor, ids: Tensor) -> Any:
        return ids, weights, None


def logits_again(module: Any, args: tuple, kwargs: dict, output: Any) -> tuple[Tensor, Tensor, Tensor]:
    return F.linear(args[0], module.linear.weight), output[1], output[0]


@pytest.mark.parametrize("by_name", [True, False])
def test_a_gate_without_logits_is_served_once_they_are_computed_again(by_name: bool) -> None:
    register_router("MoEGate" if by_name else MoEGate, logits_again)
    metrics = check(model_of(MoEGate(), lambda o: (o[1], o[0])))
    assert "balance/policy_0/gradient_ratio" in metrics


@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
def test_registered_routers_compile() -> None:
    register_router(MoEGate, logits_again)
    torch.manual_seed(0)
    model = model_of(MoEGate(keeps=False), lambda o: (o[1], o[0]))
    gradients = []
    for called in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        balancer = Balancer(model, [AuxLoss("micro_batch", 0.5)], example={"x": X})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        balancer.tap(called(X).square().mean()).backward()
        optimizer.step()
        gradients.append(model.blocks[0].router.linear.weight.grad.clone())
        balancer.remove()
    assert torch.allclose(*gradients, atol=1e-12)


def test_weights_are_written_where_they_lay_in_nested_outputs() -> None:
    class Nested(Gate):
        def output(self, z: Tensor, weights: Tensor, ids: Tensor) -> Any:
            return {"aux": 0.0, "routing": [z, Named(None, weights, (ids,))]}

    def nested(module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        z, rest = output["routing"]
        return z, rest.weights, rest.ids[0]

    register_router(Nested, nested)
    check(model_of(Nested(), lambda o: (o["routing"][1].weights, o["routing"][1].ids[0])))


class Packed(Gate):
    """Weights and ids in one tensor: (B, S, 2 K)."""

    def output(self, z: Tensor, weights: Tensor, ids: Tensor) -> Any:
        return z, torch.cat([weights, ids.to(weights.dtype)], dim=-1)


def unpacked(output: Any) -> tuple[Tensor, Tensor]:
    return output[1][..., :2], output[1][..., 2:].long()


def test_write_puts_them_anywhere() -> None:
    """Without write= the message says so, and the remedy is to pass it."""
    model = model_of(Packed(), unpacked)
    register_router(Packed, lambda module, args, kwargs, output: (output[0], *unpacked(output)))
    with pytest.raises(ConfigError, match="read= made a new tensor of them") as caught:
        Balancer(model, [BIAS], example={"x": X})
    assert "pass write=" in caught.value.do
    register_router(
        Packed,
        lambda module, args, kwargs, output: (output[0], *unpacked(output)),
        lambda output, weights, ids: (output[0], torch.cat([weights, ids.to(weights.dtype)], dim=-1)),
    )
    check(model)


def test_ids_that_cannot_be_written_leave_a_loss_and_no_bias() -> None:
    class Onehot(Gate):
        def output(self, z: Tensor, weights: Tensor, ids: Tensor) -> Any:
            return z, weights, F.one_hot(ids, E).double()

    register_router(Onehot, lambda module, args, kwargs, output: (output[0], output[1], output[2].argmax(dim=-1)))
    model = model_of(Onehot(), lambda o: (o[1], o[2].argmax(dim=-1)))
    check(model, policies=())
    with pytest.raises(ConfigError, match="other expert ids would not reach its block") as caught:
        Balancer(model, [BIAS], example={"x": X})
    assert "AuxLoss" in caught.value.do


def test_the_temperature_is_named_and_the_line_works_as_it_is_printed() -> None:
    class Temperature(Gate):
        def scores(self, z: Tensor) -> Tensor:
            return (z / 0.7).softmax(dim=-1)

    model = model_of(Temperature(), lambda o: o[1:])
    with pytest.raises(ConfigError, match=r"softmax of its logits divided by 0\.7\n") as caught:
        Balancer(model, [AuxLoss("micro_batch", 0.1)], example={"x": X})
    exec(caught.value.do, {"equipoise": equipoise, "Temperature": Temperature})
    weight = model.blocks[0].router.linear.weight
    got, _, _ = pushed(model, weight, X, lambda c: [AuxLoss("micro_batch", c), BIAS])
    ids = (X @ weight.T).topk(2, dim=-1).indices
    want = naive_push(X, weight / 0.7, ids_of(ids), "softmax") / 0.7
    assert float((got - want).norm() / want.norm()) < 1e-10


def test_weights_that_hold_more_need_the_gate_below_them() -> None:
    class Scaled(Gate):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.rand(E) + 0.5)

        def output(self, z: Tensor, weights: Tensor, ids: Tensor) -> Any:
            return z, weights * self.factor[ids], ids

    model = model_of(Scaled(), lambda o: o[1:])
    with pytest.raises(ConfigError, match="whose weights follow from none") as caught:
        Balancer(model, [AuxLoss("micro_batch", 0.1)], example={"x": X})
    line = re.search(r"equipoise\.register_router\(Scaled, gate=\"softmax\"\)", caught.value.do)
    assert line
    exec(line[0], {"equipoise": equipoise, "Scaled": Scaled})
    metrics = check(model, policies=())
    assert "balance/policy_0/gradient_ratio" not in metrics
    with pytest.raises(ConfigError, match="weights hold more than scores"):
        Balancer(model, [BIAS], example={"x": X})


def bad(module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
    return output[7]


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (bad, "IndexError"),
        (lambda m, a, k, o: (o[1], o[0]), "float64 (2, 16, 2), int64 (2, 16, 2) of MoEGate"),
        (lambda m, a, k, o: (o[1], o[1], o[1]), "float64 (2, 16, 2), float64"),
        (lambda m, a, k, o: (F.linear(a[0], m.linear.weight), o[1], o[0] + E), "to 7, for MoEGate (blocks.0.router)"),
        (lambda m, a, k, o: (F.linear(a[0], m.linear.weight).detach(), o[1], o[0]), "whose logits have none"),
    ],
)
def test_a_read_that_is_wrong_is_told_so(wrong: Any, got: str) -> None:
    register_router(MoEGate, wrong)
    with pytest.raises(ConfigError, match=re.escape(got)) as caught:
        Balancer(model_of(MoEGate(), lambda o: (o[1], o[0])), [AuxLoss("micro_batch", 0.1)], example={"x": X})
    assert "read" in caught.value.do
    assert "MoEGate" in caught.value.do


def test_the_page_runs_as_it_stands_and_its_models_are_pushed() -> None:
    text = (ROOT / "docs" / "own-router.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "page"}
    first, gate, scaled, nano, own = re.findall(r"```python\n(.*?)```", text, re.S)
    torch.manual_seed(0)

    def step(model: nn.Module, balancer: Balancer, optimizer: Any) -> None:
        balancer.tap(model(torch.randn(2, 8, 16)).square().mean()).backward()
        optimizer.step()
        assert balancer.load()[0].sum() == 32

    exec(compile(first, "own-router.md", "exec"), names)
    step(names["model"], names["balancer"], names["optimizer"])
    exec(compile(gate, "own-router.md", "exec"), names)
    exec(compile(scaled, "own-router.md", "exec"), names)

    class DeepSeek(names["Block"]):
        def forward(self, x: Tensor) -> Tensor:
            ids, weights, _ = self.gate(x)
            flat = x.flatten(0, 1)
            every = torch.stack([expert(flat) for expert in self.experts], dim=1)
            return x + (every.gather(1, ids.unsqueeze(-1).expand(-1, -1, 16)) * weights.unsqueeze(-1)).sum(1).view_as(x)

    for block in (DeepSeek(names["MoEGate"](16, 4, 2)), names["Block"](names["Scaled"](16, 4, 2))):
        model = nn.Sequential(block)
        optimizer = torch.optim.AdamW(model.parameters())
        step(model, Balancer(model, [AuxLoss()], example={"input": torch.randn(2, 8, 16)}), optimizer)
    exec(compile(nano, "own-router.md", "exec"), names)
    step(names["model"], names["balancer"], names["optimizer"])
    exec(compile(own, "own-router.md", "exec"), names)
    check_by_carrier(names["router"].double(), names["balancer"])


def check_by_carrier(router: Any, balancer: Balancer) -> None:
    """The gradient that the router of the page's last block gets is autograd's of its sequence loss itself."""
    x = torch.randn(4, 3, 16, dtype=torch.float64)  # (S, B, D)
    balancer.discard()
    router.weight.grad = None
    weights, picked = router(x)
    balancer.tap(weights.sum() * 0.0).backward()
    got = router.weight.grad.clone()
    weight = router.weight.detach().clone().requires_grad_()
    scores = (5 * torch.tanh(x @ weight.T)).sigmoid()
    probs = scores / scores.sum(dim=-1, keepdim=True)
    values = [4 * (picked[:, b].double().mean(0) / 2 * probs[:, b].mean(0)).sum() for b in range(3)]
    loss = sum(values) / 3
    (1e-4 * loss).backward()
    assert weight.grad is not None and float((got - weight.grad).norm() / weight.grad.norm()) < 1e-12
    balancer.step()
    assert balancer.metrics()["balance/sequence/loss"] == pytest.approx(float(loss.detach()))
