"""What a balancer saves and takes back: biases that weights did not bring, names not places, a model that changed."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from contracts.law._model import BIAS, SMALL, gradients, loss_of, make_step, net, train_step
from equipoise import AuxLoss, Balancer, ConfigError, ExpertBias, MoE, StateError, Switch

TWO: dict[str, Any] = {"experts": (5, 6), "top_k": (2, 2), "gate": "sigmoid"}
MOMENTUM = ExpertBias("momentum", rate=0.1)


def trained(*policies: Any, steps: int = 3, **options: Any) -> tuple[Any, Balancer, torch.optim.Optimizer]:
    model = net(**(TWO | options))
    balancer = Balancer(model, list(policies) or [BIAS])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for seed in range(steps):
        train_step(model, balancer, optimizer, make_step(seed))
    return model, balancer, optimizer


def biases(model: Any) -> list[list[float]]:
    return [block.gate.expert_bias.tolist() for block in model.blocks]


def saved(value: Any) -> Any:
    """Through a file, as a user's checkpoint goes."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)


# ---------------------------------------------------------------- biases that the model's weights did not bring


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("first", ["model", "balancer"])
@pytest.mark.parametrize("how", ["dcp", "strict", "loose"])
def test_a_resumed_run_goes_on_whatever_is_loaded_first(how, first, tmp_path):
    """Before the balancer is made a model has no bias: its own loading takes that of a file, DCP asks for none."""
    model, balancer, optimizer = trained()
    weights, state = saved(model.state_dict()), saved(balancer.state_dict())
    if how == "dcp":
        dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path)
    other = net(1, **TWO)
    again = Balancer(other, [BIAS]) if first == "balancer" else None
    if how == "dcp":
        asked = {"model": other.state_dict()}
        dcp.load(asked, checkpoint_id=tmp_path)
        other.load_state_dict(asked["model"])
    else:
        other.load_state_dict(weights, strict=how == "strict")
    again = again or Balancer(other, [BIAS])
    again.load_state_dict(state)
    assert biases(other) == biases(model)
    second = torch.optim.SGD(other.parameters(), lr=0.05)
    for one, b, o in ((model, balancer, optimizer), (other, again, second)):
        train_step(one, b, o, make_step(7))
    assert biases(other) == biases(model)
    assert again.step_count == balancer.step_count == 4


def test_biases_that_went_through_bf16_become_exact_again():
    model, balancer, _ = trained(ExpertBias("proportional", rate=0.0123))
    state, exact = balancer.state_dict(), biases(model)
    for block in model.blocks:
        block.gate.expert_bias.copy_(block.gate.expert_bias.bfloat16().float())
    assert biases(model) != exact
    balancer.load_state_dict(state)
    assert biases(model) == exact


def test_biases_of_another_checkpoint_are_an_error_and_stay():
    model, balancer, optimizer = trained()
    state = saved(balancer.state_dict())
    for seed in range(5):
        train_step(model, balancer, optimizer, make_step(20 + seed))
    now, step = biases(model), balancer.step_count
    with pytest.raises(ConfigError, match=r"(?s)this model.*other expert biases.*weights first"):
        balancer.load_state_dict(state)
    assert biases(model) == now
    assert balancer.step_count == step
    lines = balancer.load_state_dict(state, strict=False)
    assert lines == [f"blocks.{i}.gate: other expert biases in the model's weights than in the state" for i in (0, 1)]
    assert biases(model) == now, "the weights' own stay"


def test_a_bias_without_a_policy_would_be_lost():
    _, balancer, _ = trained()
    other = net(**TWO)
    plain = Balancer(other, [AuxLoss("micro_batch", 0.1)])
    with pytest.raises(ConfigError, match=r"ExpertBias\(rate=0\.0\)"):
        plain.load_state_dict(balancer.state_dict())
    plain.remove()
    kept = Balancer(other, [AuxLoss("micro_batch", 0.1), ExpertBias(rate=0.0)])
    kept.load_state_dict(balancer.state_dict())
    assert biases(other)[0] == balancer.state_dict()["layers"]["blocks.0.gate"]["expert_bias_E"].tolist()


# ---------------------------------------------------------------- policies by name


@pytest.mark.parametrize("wrapped", ["compiled", "averaged", "module"])
def test_a_state_is_of_the_model_not_of_its_wrapper(wrapped):
    """Saved before ``torch.compile`` or DDP wrapped it, or after."""
    policies: list[Any] = [AuxLoss("global_batch", estimator="previous"), ExpertBias("sign", 0.01)]
    model, balancer, _ = trained(*policies)
    state = balancer.state_dict()
    balancer.remove()
    inner = nn.Module()
    inner.module = model  # the name that DDP gives it
    make = {"compiled": lambda: torch.compile(model, backend="eager"), "averaged": lambda: AveragedModel(model)}
    wrapper: Any = make[wrapped]() if wrapped in make else inner
    there = Balancer(wrapper, policies)
    there.load_state_dict(state)
    back = there.state_dict()
    there.remove()
    again = Balancer(model, policies)
    again.load_state_dict(back)
    want, got = (
        [one["previous_E"].tolist() for one in each["layers"].values()] for each in (state, again.state_dict())
    )
    assert want == got and all(map(any, want))


def momenta(balancer: Balancer) -> dict[str, Any]:
    layers = balancer.state_dict()["layers"]
    return {name: [t.tolist() for t in row] for row in [layers["blocks.0.gate"]["momentum_E"]] for name, *row in row}


@pytest.mark.parametrize(
    "policies",
    [
        [AuxLoss("micro_batch", 0.1), MOMENTUM],
        [MOMENTUM, AuxLoss("micro_batch", 0.1)],
        [ExpertBias("sign", rate=0.01), AuxLoss("sequence", 0.1), MOMENTUM],
        [Switch(at=10, first=MOMENTUM, to=MOMENTUM), MOMENTUM],
    ],
)
def test_a_policy_keeps_its_memory_wherever_it_stands(policies):
    """Inserted before it, behind it, or moved: its memory is found by what it is."""
    _, balancer, _ = trained(MOMENTUM)
    before = momenta(balancer)
    assert len(before) == 1
    again = Balancer(net(**TWO), policies)
    again.load_state_dict(balancer.state_dict())
    assert momenta(again) == before


def test_two_rules_do_not_take_each_other_s_memory():
    fast, slow = ExpertBias("momentum", rate=0.1, beta=0.1), ExpertBias("momentum", rate=0.1, beta=0.9)
    _, balancer, _ = trained(fast, slow)
    before = momenta(balancer)
    assert before["momentum(kappa=2.0, beta=0.1)"] != before["momentum(kappa=2.0, beta=0.9)"]
    again = Balancer(net(**TWO), [slow, AuxLoss(), fast])
    again.load_state_dict(balancer.state_dict())
    assert momenta(again) == before


def test_a_rule_that_is_gone_is_said():
    _, balancer, _ = trained(MOMENTUM)
    again = Balancer(net(**TWO), [BIAS])
    with pytest.raises(ConfigError, match=r"(?s)'momentum\(kappa=2\.0, beta=0\.5\)' is in the state.*strict=False"):
        again.load_state_dict(balancer.state_dict())
    assert again.load_state_dict(balancer.state_dict(), strict=False) == [
        "policy 'momentum(kappa=2.0, beta=0.5)' is in the state, not in the balancer"
    ]
    assert momenta(again) == {}


# ---------------------------------------------------------------- a model that changed


KINDS = [
    [AuxLoss("global_batch")],
    [AuxLoss("global_batch", estimator="previous")],
    [AuxLoss("global_batch", estimator="ema")],
    [AuxLoss("micro_batch")],
    [MOMENTUM],
    [BIAS],
]


@pytest.mark.parametrize("policies", KINDS)
def test_the_state_of_other_experts(policies):
    """A router that grew: refused on load, and with strict=False it begins anew while the others go on."""
    _, balancer, _ = trained(*policies)
    model = net(experts=(5, 7), top_k=(2, 2), gate="sigmoid")
    again = Balancer(model, policies)
    with pytest.raises(ConfigError, match=r"blocks\.1\.gate: 6 experts in the state, 7 in the model"):
        again.load_state_dict(balancer.state_dict())
    left_out = again.load_state_dict(balancer.state_dict(), strict=False)
    assert left_out == ["blocks.1.gate: 6 experts in the state, 7 in the model"]
    assert again.step_count == 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for seed in range(2):
        train_step(model, again, optimizer, make_step(seed, 2))
    assert again.step_count == 5


@pytest.mark.parametrize("policies", KINDS)
def test_the_state_of_other_layers(policies):
    _, balancer, _ = trained(*policies)
    for experts, lines in (
        ((5, 6, 4), ["blocks.2.gate: not in the state"]),
        ((5,), ["blocks.1.gate: in the state, not in the model"]),
    ):
        model = net(experts=experts, top_k=(2,) * len(experts), gate="sigmoid")
        again = Balancer(model, policies)
        with pytest.raises(ConfigError, match=lines[0].replace(".", r"\.")):
            again.load_state_dict(balancer.state_dict())
        assert again.load_state_dict(balancer.state_dict(), strict=False) == lines
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for seed in range(2):
            train_step(model, again, optimizer, make_step(seed, 2))


@pytest.mark.parametrize("policies", [[AuxLoss("global_batch")], [BIAS]])
@pytest.mark.parametrize("how", ["appended", "in place of a dense layer"])
def test_a_router_that_came_later_is_noticed_at_the_next_tap(how, policies):
    model = net(**TWO)
    model.dense = nn.ModuleList([nn.Linear(8, 8)])
    model.blocks.append(MoEWithDense())
    balancer = Balancer(model, policies)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    train_step(model, balancer, optimizer, make_step(0))
    new = MoE(8, 8, 4, 2, gate="sigmoid", batch_first=True)
    if how == "appended":
        model.blocks.append(new)
    else:
        model.blocks[2].inside = new
    optimizer.add_param_group({"params": list(new.parameters())})
    with pytest.raises(StateError, match=r"(?s)routers that were there.*gate', which nobody.*strict=False"):
        balancer.tap(loss_of(model, make_step(1)[0]))
    with pytest.raises(StateError, match="which nobody"):  # and again: nothing trains silently
        balancer.tap(loss_of(model, make_step(1)[0]))
    state = balancer.state_dict()  # the remedy, to the letter
    balancer.remove()
    again = Balancer(model, policies)
    assert len(again.load_state_dict(state, strict=False)) == 1
    train_step(model, again, optimizer, make_step(1))
    assert len(again.load()) == 3
    assert int(again.load()[-1].sum()) == 20


class MoEWithDense(nn.Module):
    """A dense block among MoE layers, of which the inner part may be replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: nn.Module = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.inside(x, **kwargs) if isinstance(self.inside, MoE) else self.inside(x)


# ---------------------------------------------------------------- averages of the weights


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_averaged_model_made_after_the_balancer_keeps_the_bias(use_buffers):
    model = net(**TWO)
    balancer = Balancer(model, [BIAS])
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    mean = [torch.zeros(5), torch.zeros(6)]
    for seed in range(4):
        train_step(model, balancer, optimizer, make_step(seed))
        average.update_parameters(model)
        now = [block.gate.expert_bias for block in model.blocks]
        mean = [b.clone() if seed == 0 else 0.5 * m + 0.5 * b for m, b in zip(mean, now, strict=True)]
    expected = mean if use_buffers else [block.gate.expert_bias for block in model.blocks]
    for block, bias_E in zip(average.module.blocks, expected, strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(block.gate.expert_bias, bias_E)
    average.module.load_state_dict(model.state_dict())


@pytest.mark.parametrize("made", ["before", "after"])
def test_an_average_of_one_s_own_gets_the_bias_by_copy_biases(made):
    model = net(**TWO)
    average: Any = copy.deepcopy(model) if made == "before" else None
    balancer = Balancer(model, [BIAS])
    average = average or copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for seed in range(3):
        train_step(model, balancer, optimizer, make_step(seed))
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.lerp_(p, 0.1)
        balancer.copy_biases(average)
        assert biases(average) == biases(model)
    assert average.blocks[0].gate.balance_state is None
    average(make_step(0)[0].x_BSD).sum().backward()
    train_step(model, balancer, optimizer, make_step(9))
    assert balancer.step_count == 4
    assert gradients(average)


def test_copy_biases_through_wrappers_and_into_another_model():
    model, balancer, _ = trained()
    wrapped = AveragedModel(net(2, **TWO))
    balancer.copy_biases(wrapped)
    assert biases(wrapped.module) == biases(model)
    for other in (net(**SMALL), net(experts=(5, 7), top_k=(2, 2))):
        with pytest.raises(ConfigError, match="a copy of the model"):
            balancer.copy_biases(other)
        assert all(block.gate.balance_state is None for block in other.blocks)
