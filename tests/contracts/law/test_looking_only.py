"""Balancer(model, []): everything is measured, nothing is changed."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from contracts.law._external import Block, Chain, D, Gate
from contracts.law._model import DIM, gradients, loss_of, make_step, net, train_step
from equipoise import AuxLoss, Balancer, ConfigError, ExpertBias, Router, StateError, ZLoss
from equipoise.balancer.signals import SIGNALS


def saved_by(run) -> tuple[list[tuple], Tensor]:
    """(shapes of all tensors that forward keeps for backward, the loss)."""
    shapes: list[tuple] = []

    def note(tensor: Tensor) -> Tensor:
        shapes.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = run()
    return shapes, loss


@pytest.mark.parametrize("mode", ["plain", "reentrant", "non_reentrant"])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_are_those_of_a_model_without_a_balancer_to_the_last_bit(mode, normalize):
    found, kept, states = [], [], []
    for looks in (False, True):
        model = net(mode=mode, normalize=normalize, dropout=0.2)
        torch.manual_seed(1)  # before: making a balancer may not draw
        balancer = Balancer(model, []) if looks else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for micro in make_step(micro_batches=2, masked=True):
            shapes, loss = saved_by(lambda model=model, micro=micro: loss_of(model, micro))
            (balancer.tap(loss) if balancer else loss).backward()
            kept.append(shapes)
        found.append(gradients(model))
        optimizer.step()
        states.append(model.state_dict())
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name
    assert kept[:2] == kept[2:], "nothing of the tokens is kept for backward"
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(one, states[1][name]) for name, one in states[0].items())


@pytest.mark.parametrize("mode", ["plain", "reentrant", "non_reentrant"])
def test_it_measures_what_a_policy_without_a_coefficient_measures(mode):
    step, found = make_step(micro_batches=3, masked=True), []
    for policies in ([], [AuxLoss("sequence", coef=0.0), ExpertBias(rate=0.0)]):
        model = net(mode=mode)
        balancer = Balancer(model, policies)
        train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.1), step)
        assert balancer.step_count == 1
        found.append((balancer.load(), balancer.metrics()))
    (loads, looked), (others, measured) = found
    assert all(torch.equal(one, other) for one, other in zip(loads, others, strict=True))
    assert {"balance/maxvio_global", "balance/layer_01/entropy_global", "balance/dead_experts"} <= looked.keys()
    assert not any("flips" in key for key in looked), "nobody looked at what ran again"
    assert looked == {key: pytest.approx(measured[key], rel=1e-12) for key in looked}
    assert {key.split("/")[-1] for key in measured.keys() - looked.keys()} == {
        "loss", "gradient_ratio", "recompute_flips", "bias_max", *SIGNALS}  # fmt: skip


def test_numbers_of_each_layer_can_be_left_out():
    model = net(experts=(6,) * 9, top_k=(2,) * 9)
    balancer = Balancer(model, [AuxLoss("global_batch"), ExpertBias()])
    train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.1), make_step())
    few, every = balancer.metrics(layers=False), balancer.metrics()
    assert few == {key: number for key, number in every.items() if "/layer_" not in key}
    assert len(few) <= 16 + len(SIGNALS) < len(every)


def test_it_says_so():
    text = " ".join(Balancer(net(), []).describe().split())
    assert "none: loads are measured and nothing is balanced" in text
    assert "switched off nothing of the model's own" in text


def test_frozen_routers_and_a_bias_that_nobody_moves_are_only_looked_at():
    frozen, biased = net(), net(selection_bias=True, gate="sigmoid")
    for block in frozen.blocks:
        block.gate.requires_grad_(False)
    biased.blocks[0].gate.expert_bias[0] = 1.0
    for model in (frozen, biased):
        before = {name: one.clone() for name, one in model.state_dict().items()}
        balancer = Balancer(model, [])  # warnings are errors here
        train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.0), make_step())
        assert all(torch.equal(one, model.state_dict()[name]) for name, one in before.items())
        assert all(int(counts_E.sum()) == 20 for counts_E in balancer.load())
    assert balancer.metrics()["balance/layer_00/bias_max"] == 1.0


def test_a_loop_that_forgot_the_tap_is_told_of_it():
    model = net()
    balancer, optimizer = Balancer(model, []), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # may be steps for another loss
        loss_of(model, make_step()[0]).backward()
        optimizer.step()
    loss_of(model, make_step()[0]).backward()
    with pytest.raises(StateError, match=r"balancer\.tap\(loss\) before backward"):
        optimizer.step()
    balancer.tap(loss_of(model, make_step()[0])).backward()  # what it says helps
    optimizer.step()
    assert balancer.metrics()["balance/tokens"] == 10


class Deaf(Block):
    """A block that weighs all experts alike, whatever its router's weights are."""

    def mixed(self, x, weights, ids):
        return super().mixed(x, torch.full_like(weights.detach(), 0.5), ids)


class Odd(Gate):
    """Weights that follow from no gate."""

    def output(self, z, weights, ids):
        return z, weights.square() + 0.1, ids


@pytest.mark.parametrize("kind", ["weights unused", "weights of no gate"])
def test_routers_that_nothing_could_push_are_looked_at(kind):
    torch.manual_seed(0)
    gates = [(Gate if kind == "weights unused" else Odd)("plain") for _ in range(2)]
    model = Chain(*((Deaf if kind == "weights unused" else Block)(gate) for gate in gates))
    x = torch.randn(2, 5, D)
    with pytest.raises(ConfigError):
        Balancer(model, [AuxLoss("global_batch")], example={"x": x})
    plain = model(x)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        balancer = Balancer(model, [], example={"x": x})
    assert any("maxvio_gate" in str(one.message) for one in told) == (kind == "weights of no gate")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    assert torch.equal(model(x), plain)
    balancer.discard()
    balancer.tap(model(x).square().mean()).backward()
    optimizer.step()
    for gate, counts_E in zip(gates, balancer.load(), strict=True):
        assert gate.seen is not None
        assert counts_E.tolist() == torch.bincount(gate.seen[2].flatten(), minlength=4).tolist()


def test_a_router_of_ours_by_itself():
    router = Router(DIM, 4, 2)
    balancer, optimizer = Balancer(router, []), torch.optim.SGD(router.parameters(), lr=0.1)
    balancer.tap(router(torch.randn(6, DIM)).weights_TK.square().sum()).backward()
    optimizer.step()
    found = balancer.metrics()
    assert found["balance/tokens"] == 6
    assert "balance/maxvio_sequence" not in found, "nobody said how its tokens lie"


def attributes(model: nn.Module) -> list:
    """All that a balancer may leave on a model: hooks on modules and parameters, meters, buffers and parameters."""
    found: list = [(name, one.shape, one.dtype) for name, one in model.state_dict().items()]
    for name, module in model.named_modules():
        hooks = [(key, list(value)) for key, value in vars(module).items() if "hooks" in key and value]
        found.append((name, hooks, getattr(module, "meter", None), module.training))
    return [*found, *(bool(p._post_accumulate_grad_hooks) for p in model.parameters())]


@pytest.mark.parametrize("policies", [[], [AuxLoss("sequence"), ZLoss()]])
def test_nothing_outlives_it(policies):
    model, step = net(), make_step()
    before = attributes(model)
    balancer, optimizer = Balancer(model, policies), torch.optim.SGD(model.parameters(), lr=0.0)
    train_step(model, balancer, optimizer, step)
    balancer.remove()
    assert attributes(model) == before


def test_a_bias_that_was_added_goes_with_an_error_and_stays_with_remove():
    model = net(gate="sigmoid")
    before = attributes(model)
    for block in model.blocks:
        block.gate.requires_grad_(False)
    with pytest.raises(UserWarning, match="frozen"):  # warnings are errors here
        Balancer(model, [ExpertBias()])
    assert attributes(model) == before
    with pytest.warns(UserWarning, match="frozen"):
        balancer = Balancer(model, [ExpertBias()])
    balancer.remove()
    assert [block.gate.expert_bias.tolist() for block in model.blocks] == [[0.0] * 6] * 2
