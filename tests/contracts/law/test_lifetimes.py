"""What happens to a balanced model as an object: copied, cast, saved, resumed, switched, collected."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any, cast

import pytest
import torch
from torch import nn

from contracts.law._model import BIAS, SMALL, Net, assert_close, gradients, loss_of, make_step, net, setup, train_step
from contracts.law._reference import naive_bias_step
from equipoise import AuxLoss, Balancer, ConfigError, ExpertBias, StateError, Switch


def test_a_copy_is_not_balanced():
    """An EMA or a teacher made by deepcopy, pickle or torch.save: no meter, no counting, the original goes on."""
    model, balancer, optimizer = setup()
    train_step(model, balancer, optimizer, make_step(0))
    loss = balancer.tap(loss_of(model, make_step(1)[0]))  # also in the middle of a step
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved]
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for other in (*copies, cast(Any, average.module)):
        assert other.blocks[0].gate.balance_state is None
        loss_of(other, make_step(5)[0]).backward()
        with torch.no_grad():
            loss_of(other, make_step(5)[0])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    average.update_parameters(model)
    assert balancer.metrics()["balance/tokens"] == 10
    second = Balancer(
        copies[0], [AuxLoss("micro_batch", 0.3), ExpertBias(rate=0.0)]
    )  # and may get a balancer of its own
    train_step(copies[0], second, torch.optim.SGD(copies[0].parameters(), lr=0.1), make_step(2))
    train_step(model, balancer, optimizer, make_step(2))
    assert (balancer.step_count, second.step_count) == (3, 1)


def test_a_module_that_holds_its_balancer_can_be_copied_and_saved():
    """A LightningModule does; the copy has none, as its routers have none."""
    model, balancer, optimizer = setup()
    model.balancer = balancer
    copies = [copy.deepcopy(model), cast(Any, torch.optim.swa_utils.AveragedModel(model)).module]
    with pytest.warns(UserWarning, match=r"saved as None: keep balancer.state_dict\(\)"):
        copies.append(pickle.loads(pickle.dumps(model)))
    assert [one.balancer for one in copies] == [None] * 3 and model.balancer is balancer
    train_step(model, balancer, optimizer, make_step(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_the_model_leaves_the_bias_in_fp32(dtype):
    """B34, B38, B39, B55: in bf16 steps of 1e-3 stop at 0.5, those of 1e-4 at 0.031."""
    model, balancer, _ = setup(ExpertBias(rule="sign", rate=1e-4))
    bias = model.blocks[0].gate.expert_bias
    bias.copy_(torch.tensor([0.6, -0.7, 0.3, 0.123456789, -0.323456789]))
    before = bias.clone()
    model.to(dtype)
    assert model.blocks[0].gate.expert_bias.dtype == torch.float32
    assert torch.equal(model.blocks[0].gate.expert_bias, before)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    train_step(model, balancer, optimizer, make_step(0, dtype=dtype))
    moved = model.blocks[0].gate.expert_bias
    counts = balancer.load()[0].tolist()
    expected, _ = naive_bias_step(before.tolist(), counts, "sign", 1e-4, [])
    assert moved.tolist() == pytest.approx(expected, abs=1e-7)
    assert moved.dtype == torch.float32
    assert torch.load(saved_state(model))["blocks.0.gate.expert_bias"].dtype == torch.float32


def saved_state(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return file


def test_the_bias_survives_save_and_load_in_a_cast_model():
    """B35, B37, B55: persistent, fp32, and the same after a round trip, also when the checkpoint is assigned."""
    model, balancer, optimizer = setup(ExpertBias(rule="proportional", rate=0.0123))
    train_step(model, balancer, optimizer, make_step(0))
    expected = model.blocks[0].gate.expert_bias.clone()
    assert expected.abs().max() > 0
    state = torch.load(saved_state(model))
    for assign in (False, True):
        fresh = net(4, **SMALL, selection_bias=True).to(torch.bfloat16)
        fresh.load_state_dict(state, assign=assign)
        assert torch.equal(fresh.blocks[0].gate.expert_bias, expected)
        assert fresh.blocks[0].gate.expert_bias.dtype == torch.float32


def test_meta_and_to_empty():
    """A model that gets its memory late, before or after the balancer is attached: bias zero, meters work."""
    counts = []
    for attach_early in (True, False):
        with torch.device("meta"):
            model = Net(**SMALL, selection_bias=True)
        balancer = Balancer(model, [AuxLoss("micro_batch", 0.3), BIAS]) if attach_early else None
        model.to_empty(device="cpu")
        torch.manual_seed(3)
        for block in model.blocks:
            block.reset_parameters()
        nn.init.normal_(model.inp.weight)
        nn.init.zeros_(model.inp.bias)
        bias = model.blocks[0].gate.expert_bias
        assert bias.device.type == "cpu"
        assert bias.dtype == torch.float32
        assert bias.abs().max() == 0
        balancer = balancer or Balancer(model, [AuxLoss("micro_batch", 0.3), BIAS])
        train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.1), make_step(0))
        counts.append(balancer.load()[0].tolist())
    assert counts[0] == counts[1]
    assert sum(counts[0]) == 20


def test_switches_and_schedules_act_at_their_step():
    """A policy that starts, ends or changes strength at a step: gradients equal those of the plain policy there."""
    cases = [
        (Switch(at=1, first=AuxLoss("micro_batch", 0.3), to=AuxLoss("sequence", 0.5)), ["micro", "sequence"]),
        (Switch(at=1, to=AuxLoss("sequence", 0.5)), ["none", "sequence"]),
        (AuxLoss("micro_batch", coef=lambda step: 0.3 if step == 0 else 0.0), ["micro", "none"]),
    ]
    plain = {
        "micro": AuxLoss("micro_batch", 0.3),
        "sequence": AuxLoss("sequence", 0.5),
        "none": AuxLoss("micro_batch", 0.0),
    }
    for switched, expected in cases:
        model, balancer, optimizer = setup(switched)
        for name in expected:
            fresh = copy.deepcopy(model)
            other = Balancer(fresh, [plain[name]])
            truth = train_step(fresh, other, torch.optim.SGD(fresh.parameters(), lr=0.05), make_step(0))
            assert_close(train_step(model, balancer, optimizer, make_step(0)), truth, 1e-6)
            found = balancer.metrics()
            assert any(key.endswith("/loss") for key in found) == (name != "none" or not isinstance(switched, Switch))


@pytest.mark.parametrize("rule", ["sign", "proportional", "rms", "momentum"])
def test_bias_rules_and_schedule_against_loops(rule):
    """Loss-free: the whole step's counts, centred (B45, B52), fp32; rate 0 freezes to the last bit."""
    rates = [0.02, 0.01, 0.0]
    model, balancer, optimizer = setup(
        ExpertBias(rule=rule, rate=0.02, schedule=lambda step: [1.0, 0.5, 0.0][step]), selection_bias=True
    )
    bias, momentum = [0.0] * 5, [0.0] * 5
    for seed, rate in enumerate(rates):
        train_step(model, balancer, optimizer, make_step(seed, 3))
        counts = balancer.load()[0].tolist()
        assert sum(counts) == 60
        bias, momentum = (
            naive_bias_step(bias, counts, rule, rate, momentum) if rate else (bias, momentum)
        )  # fmt: skip
        assert model.blocks[0].gate.expert_bias.tolist() == pytest.approx(bias, abs=1e-7)
        bias = model.blocks[0].gate.expert_bias.tolist()


def test_state_dict_round_trip_in_the_middle_of_training():
    """Resume: the same numbers to the last bit, with everything that remembers: previous, ema, momentum, schedule."""
    policies = [
        AuxLoss("global_batch", 0.3, estimator="previous"),
        AuxLoss("global_batch", 0.3, estimator="ema", decay=0.5),
        ExpertBias(rule="momentum", rate=0.01, schedule=lambda step: 1.0 / (1 + step)),
        Switch(at=3, to=AuxLoss("sequence", 0.2)),
    ]
    model, balancer, optimizer = setup(*policies)
    for seed in range(2):
        train_step(model, balancer, optimizer, make_step(seed, 2))
    balancer.tap(loss_of(model, make_step(50)[0])).backward()  # a half-done step is in no checkpoint
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "balancer": balancer.state_dict()}, saved)
    saved.seek(0)
    state = torch.load(saved)  # weights_only: plain containers and tensors
    optimizer.zero_grad()
    balancer.discard()
    resumed, second, stepper = setup(*policies)
    resumed.load_state_dict(state["model"])
    second.load_state_dict(state["balancer"])
    for seed in range(2, 5):
        a = train_step(model, balancer, optimizer, make_step(seed, 2))
        b = train_step(resumed, second, stepper, make_step(seed, 2))
        assert all(torch.equal(a[n], b[n]) for n in a)
        assert balancer.metrics() == second.metrics()
    for x, y in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(x, y)
    assert balancer.step_count == second.step_count == 5


def test_remove_then_another_balancer():
    model, balancer, optimizer = setup(AuxLoss("micro_batch", 0.3))
    train_step(model, balancer, optimizer, make_step(0))
    balancer.remove()
    free = copy.deepcopy(model)
    for run in (model, free):
        loss_of(run, make_step(1)[0]).backward()
    assert_close(gradients(model), gradients(free), 0)
    optimizer.step()  # no tap, no error: nobody watches
    optimizer.zero_grad()
    second = Balancer(model, [AuxLoss("sequence", 0.3)])
    train_step(model, second, optimizer, make_step(2))
    assert (balancer.step_count, second.step_count) == (1, 1)


def test_what_is_removed_twice_leaves_the_next_balancer_alone():
    model, first, optimizer = setup(AuxLoss("micro_batch", 0.3))
    train_step(model, first, optimizer, make_step(0))
    first.remove()
    second = Balancer(model, [AuxLoss("micro_batch", 0.3)], optimizer)
    first.remove()
    train_step(model, second, optimizer, make_step(1))
    assert second.step_count == 1


def test_a_removed_balancer_does_not_describe_what_is_no_longer_so():
    model, balancer, optimizer = setup(AuxLoss("micro_batch", 0.3))
    train_step(model, balancer, optimizer, make_step(0))
    assert "removed " not in balancer.describe() and "switched off" in balancer.describe()
    balancer.remove()
    said = balancer.describe()
    assert said.startswith("removed ") and "the last step" in said
    assert not any(line.startswith(("tokens", "switched off")) for line in said.splitlines())


@pytest.mark.parametrize("on_fault", ["raise", "warn"])
def test_a_tap_after_remove_is_the_identity(on_fault):
    """``remove()`` is what errors advise for training without balance; the loop still has its tap."""
    model = net(**SMALL)
    balancer = Balancer(model, [AuxLoss("micro_batch", 0.3)], on_fault=on_fault)
    balancer.remove()
    plain, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=0.1)
    (micro,) = make_step(0)
    loss = loss_of(model, micro)
    assert balancer.tap(loss) is loss
    loss.backward()
    optimizer.step()
    loss_of(plain, micro).backward()
    assert_close(gradients(model), gradients(plain), 0.0)
    assert balancer.step_count == 0


@pytest.mark.parametrize("trained", [False, True])
def test_model_and_balancer_are_garbage_collected_together(trained):
    """No global list and no hook may keep a model alive; nor may the balancer vanish while its model trains."""
    model, balancer, optimizer = setup()
    if trained:
        train_step(model, balancer, optimizer, make_step(0))
    gone = weakref.ref(model), weakref.ref(balancer)
    del balancer
    gc.collect()
    assert gone[1]() is not None
    loss_of(model, make_step(1)[0]).backward()
    with pytest.raises(StateError, match="tap"):  # it still guards
        optimizer.step()
    del model, optimizer
    gc.collect()
    assert gone[0]() is None
    assert gone[1]() is None


def test_a_bias_that_nobody_moves_is_an_error_until_somebody_says_so():
    """B42, B43, B49: a router that chooses with a bias and learns needs an updater, or a word that it has none."""
    model = net(experts=(5, 7), top_k=(2, 1))
    model.blocks[1].gate.enable_selection_bias()
    with pytest.raises(ConfigError, match="nobody moves while the router learns"):
        Balancer(model, [AuxLoss("micro_batch", 0.3)])
    assert all(block.gate.balance_state is None for block in model.blocks), "refused before anything was changed"
    balancer = Balancer(model, [AuxLoss("micro_batch", 0.3), ExpertBias(rate=0.0)])
    train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.1), make_step(0))
    assert model.blocks[1].gate.expert_bias.abs().max() == 0
    balancer.remove()
    balancer = Balancer(model, [ExpertBias(rate=0.001)])  # for every router, also that without a bias so far
    train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.1), make_step(0), count=False)
    assert all(block.gate.expert_bias.abs().max() > 0 for block in model.blocks)


def test_bias_only_policies_need_no_tap():
    model, balancer, optimizer = setup(BIAS)
    step = make_step(0, 2)
    for micro in step:
        (loss_of(model, micro) / 2).backward()
    optimizer.step()
    assert int(balancer.load()[0].sum()) == 2 * 20
    assert model.blocks[0].gate.expert_bias.abs().max() > 0
