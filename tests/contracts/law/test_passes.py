"""Several forwards before one tap: a pass whose output the loss does not use is as if it had not been."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equipoise import AuxLoss, Balancer, ExpertBias, MoE

POLICIES = {
    "global": [AuxLoss("global_batch", 0.3)],
    "sequence": [AuxLoss("sequence", 0.3)],
    "bias": [AuxLoss("micro_batch", 0.3), ExpertBias(rate=0.1)],
}


class Model(nn.Module):
    def __init__(self, recompute: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            MoE(dim=8, hidden=16, num_experts=4, top_k=2, gate="sigmoid", batch_first=True) for _ in range(2)
        )
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.recompute is None:
                x = x + layer(x)
            else:
                x = x + torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=self.recompute)
        return x


def tokens(seed: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, 5, 8, generator=torch.Generator().manual_seed(seed)).double().requires_grad_()


def step(loss_of: Callable[[Any], Tensor], policies: str, recompute: bool | None = None) -> tuple[list[Tensor], ...]:
    """(gradients of two micro-batches, loads, biases) of a model of its own."""
    model = Model(recompute).double()
    balancer = Balancer(model, POLICIES[policies])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        (balancer.tap(loss_of(model)) / 2).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    biases = [layer.gate.expert_bias for layer in model.layers]
    return gradients, balancer.load(), [b for b in biases if b is not None]


def mean(y: Tensor) -> Tensor:
    return y.square().mean() + y.mean()


def after(model: Any) -> Tensor:
    loss = mean(model(tokens(0)))
    unused = model(tokens(1, batch=2))
    return loss + 0.0 * float(unused.detach().sum())


def before(model: Any) -> Tensor:
    kept = model(tokens(1, batch=2))
    loss = mean(model(tokens(0)))
    assert kept.requires_grad
    return loss


def thrown_away(model: Any) -> Tensor:
    model(tokens(1, batch=2))
    return mean(model(tokens(0)))


def many(model: Any) -> Tensor:
    for seed in range(1, 12):
        model(tokens(seed))
    return mean(model(tokens(0)))


def between_two(model: Any) -> Tensor:
    one = model(tokens(0))
    model(tokens(1, batch=2))
    with torch.no_grad():
        model(tokens(2))
    return mean(torch.cat([one, model(tokens(3))]))


def stopped(model: Any) -> Tensor:
    def out_of_memory(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = model.layers[1].register_forward_pre_hook(out_of_memory)  # when the first has counted
    with pytest.raises(RuntimeError, match="memory"):
        model(tokens(1))
    handle.remove()
    return mean(model(tokens(0)))


PLAIN: dict[Any, Callable[[Any], Tensor]] = {between_two: lambda m: mean(torch.cat([m(tokens(0)), m(tokens(3))]))}


@pytest.mark.parametrize("policies", POLICIES)
@pytest.mark.parametrize("loss_of", [after, before, thrown_away, many, between_two, stopped])
def test_a_pass_that_the_loss_does_not_use_counts_nothing(loss_of, policies):
    want = step(PLAIN.get(loss_of, lambda model: mean(model(tokens(0)))), policies)
    got = step(loss_of, policies)
    for a, b in zip(want, got, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.allclose(x, y, rtol=1e-12, atol=1e-15)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("loss_of", [after, before, between_two])
def test_so_it_is_under_recompute(loss_of, recompute):
    want = step(PLAIN.get(loss_of, lambda model: mean(model(tokens(0)))), "global", recompute)
    got = step(loss_of, "global", recompute)
    for a, b in zip(want, got, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.allclose(x, y, rtol=1e-12, atol=1e-15)


def test_passes_that_the_loss_uses_are_one_micro_batch():
    """As many as are held apart, and more; the law does not know how a micro-batch was cut into passes."""
    one = step(lambda model: mean(model(torch.cat([tokens(seed) for seed in range(10)]))), "global")
    cut = step(lambda model: mean(torch.cat([model(tokens(seed)) for seed in range(10)])), "global")
    for a, b in zip(one, cut, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.allclose(x, y, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("policies", POLICIES)
def test_forwards_first_and_taps_later(policies):
    """Each tap takes the forward that its loss is made of."""
    found = []
    for late in (False, True):
        model = Model(None).double()
        balancer = Balancer(model, POLICIES[policies])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        if late:
            losses = [mean(model(tokens(seed, batch=2 + seed))) for seed in range(3)]
            losses = [balancer.tap(loss) for loss in losses]
        else:
            losses = [balancer.tap(mean(model(tokens(seed, batch=2 + seed)))) for seed in range(3)]
        for loss in losses:
            (loss / 3).backward()
        optimizer.step()
        found.append([p.grad for p in model.parameters()] + balancer.load())
    for x, y in zip(*found, strict=True):
        assert torch.allclose(x, y, rtol=1e-12, atol=1e-15)


def test_a_tap_inside_the_model_that_is_balanced():
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Model(None).double()

        def forward(self, x: Tensor) -> Tensor:
            return balancer.tap(mean(self.net(x)))

    model = WithLoss()
    balancer = Balancer(model, POLICIES["global"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(tokens(0)).backward()
    optimizer.step()
    assert balancer.metrics()["balance/tokens"] == 15


@pytest.mark.parametrize("recompute", [None, False, True])
def test_a_forward_before_the_backward_of_the_last(recompute):
    """It waits for a tap of its own: here together with one after it."""

    def run(*, early: bool) -> list[Tensor]:
        model = Model(recompute).double()
        balancer = Balancer(model, POLICIES["global"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        first = balancer.tap(mean(model(tokens(0))))
        held = model(tokens(1, batch=2)) if early else None
        (first / 2).backward()
        second = model(tokens(1, batch=2)) if held is None else held
        (balancer.tap(mean(torch.cat([second, model(tokens(2))]))) / 2).backward()
        optimizer.step()
        return [p.grad for p in model.parameters()] + balancer.load()

    for x, y in zip(run(early=False), run(early=True), strict=True):
        assert torch.allclose(x, y, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("policies", ["global", "sequence"])
def test_declared_tokens_of_a_pair(policies):
    """T is that of the step, however many forwards a micro-batch is made of."""
    found = []
    for cut in (False, True):
        model = Model(None).double()
        balancer = Balancer(model, POLICIES[policies])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        balancer.begin_step(tokens=25, micro_batches=1)
        pair = [tokens(0), tokens(1, batch=2)]
        y = torch.cat([model(x) for x in pair]) if cut else model(torch.cat(pair))
        balancer.tap(mean(y)).backward()
        optimizer.step()
        found.append([p.grad for p in model.parameters()] + balancer.load())
    for x, y in zip(*found, strict=True):
        assert torch.allclose(x, y, rtol=1e-12, atol=1e-15)


def test_what_is_held_stays_bounded():
    from equipoise.balancer.forward_passes import MOST

    model = Model(None).double()
    balancer = Balancer(model, POLICIES["global"])
    for seed in range(MOST + 20):
        model(tokens(seed, batch=1))
    assert len(balancer._passes[0]._passes) == MOST
