"""Layers of one model on several devices: what a step does is what it does on one, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from contracts.law._devices import SECOND, Moved, OnSecond, move, second_device
from contracts.law._model import gradients, make_step, net, train_step
from equipoise import AuxLoss, Balancer, ConfigError, ExpertBias, Sequences, ZLoss
from equipoise.autograd.router_state import RouterState, take_pending
from equipoise.autograd.spec import LossTerm, StatsSpec
from equipoise.functional.routing import count_choices

POLICIES = {
    "look": [],
    "all": [AuxLoss("global_batch", 0.3), AuxLoss("document", 0.3), AuxLoss("sequence", 0.1), ZLoss(0.1), ExpertBias()],
    "memory": [AuxLoss("global_batch", 0.3, estimator="ema"), ExpertBias("momentum", rate=0.01)],
    "exact": [AuxLoss("global_batch", 0.3, estimator="exact"), AuxLoss(Sequences(3), 0.2)],
    "current": [AuxLoss("data_parallel", 0.3), AuxLoss("micro_batch", 0.3, counts="unbiased")],
}


def held(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, OnSecond) else tensor


def trained(policies: list, second: tuple, *, later: bool = False, frozen: bool = False, **options: Any) -> list:
    model: Any = net(experts=(6, 6, 6), top_k=(2, 2, 2), gate="sigmoid")
    if frozen:
        model.blocks[1].gate.requires_grad_(False)

    def part() -> None:
        for i in second:
            model.blocks[i] = Moved(model.blocks[i])

    if not later:
        part()
    with pytest.warns(UserWarning, match="frozen") if frozen and policies else _nothing():
        balancer = Balancer(model, policies, **options)
    if later:
        for i in second:
            move(model.blocks[i])
            model.blocks[i].register_forward_pre_hook(_there, with_kwargs=True)
            model.blocks[i].register_forward_hook(lambda _m, _a, out: out.cpu())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, foreach=False)
    found: list = []
    for s in range(2):
        step = make_step(s, micro_batches=2, masked=True, documents=True)
        gradient = train_step(model, balancer, optimizer, step)
        found.append({name.replace(".block.", "."): held(one) for name, one in gradient.items()})
        found.append(balancer.metrics())
    for layer in balancer._layers:
        state, router = layer.balance_state, layer.router
        assert {
            state.grad_accumulator.device,
            state.grad_coefs.device,
            state.grad_coefs_raw.device,
        } == {router.weight.device}
        assert router.expert_bias is None or router.expert_bias.device == router.weight.device
    for group in balancer._groups:
        assert all(one.device == group.device for one in group.momentum.values())
    found += [held(counts_E) for counts_E in balancer.load()]
    found.append(balancer.estimator_error())
    model.eval()
    micro = make_step(9, masked=True)[0]
    with balancer.evaluation() as seen:
        model(micro.x_BSD, micro.mask_BS)
    assert seen["balance/tokens"] > 0
    state = balancer.state_dict()
    balancer.load_state_dict(state)
    for name, of_layer in state["layers"].items():
        kept = [held(one) for one in (of_layer["expert_bias_E"], of_layer["previous_E"]) if one is not None]
        found.append([name.replace(".block.", "."), kept])
    return [*found, seen]


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _there(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    here = {key: x.to(SECOND) if isinstance(x, Tensor) else x for key, x in kwargs.items()}
    return tuple(x.to(SECOND) for x in args), here


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == pytest.approx(other, rel=1e-12) if isinstance(one, float) else one == other


@pytest.mark.parametrize(
    ("policies", "second"), [*((name, (1,)) for name in POLICIES), ("all", (0, 2)), ("current", (0, 2))]
)
def test_a_step_on_two_devices_is_that_on_one(policies, second):
    one = trained(POLICIES[policies], ())
    with second_device():
        two = trained(POLICIES[policies], second)
    assert equal(one, two)


def test_a_layer_that_moves_after_the_balancer_was_made():
    one = trained(POLICIES["all"], ())
    with second_device():
        two = trained(POLICIES["all"], (1,), later=True)
    assert equal(one, two)


def test_a_frozen_layer_and_the_fidelity_of_estimators():
    options: dict[str, Any] = {"frozen": True, "measure_estimators": True}
    one = trained(POLICIES["memory"], (), **options)
    with second_device():
        two = trained(POLICIES["memory"], (2,), **options)
    assert equal(one, two)


def test_the_second_device_refuses_to_mix():
    """The instrument itself: two devices in one operation are an error, and numbers are those of a CPU."""
    with second_device():
        there, here = torch.arange(3.0, device=SECOND), torch.ones(3)
        assert there.device == SECOND
        assert (there * 2).tolist() == [0, 2, 4]
        assert (there.to("cpu") + here).tolist() == [1, 2, 3]
        for mixed in (lambda: there + here, lambda: torch.stack([there, here]), lambda: there[torch.tensor([0])]):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()


def test_meters_and_masks_of_two_gpus():
    """As far as fake tensors of GPUs go on a machine without one: no gradient does."""
    with FakeTensorMode():
        gpus = [torch.device(f"cuda:{i}") for i in (0, 1)]
        taken = take_pending([RouterState(StatsSpec(8, 2, "softmax", (LossTerm("deferred"),)), gpu) for gpu in gpus])
        assert taken.statistics_LS.device == gpus[0]
        ids_TK = torch.zeros(6, 2, dtype=torch.long, device=gpus[1])
        counts = count_choices(ids_TK, 8, torch.ones(6, dtype=torch.bool, device=gpus[0]), 2)
        assert counts.device == gpus[1]


def test_a_model_of_transformers_whose_layers_lie_apart():
    pytest.importorskip("transformers")
    from integrations.hf._cases import inputs, quiet
    from integrations.hf.families import build

    found = []
    for second in (False, True):
        with second_device():
            model: Any = build("qwen3_moe").train()
            model.set_experts_implementation("eager")  # others ask a device for its type
            model.set_attn_implementation("eager")
            if second:
                layer = move(model.model.layers[1])
                layer.register_forward_pre_hook(_all_there, with_kwargs=True)
                layer.register_forward_hook(lambda _m, _a, out: out.cpu())
            policies = [AuxLoss("document", 0.3), AuxLoss("global_batch", 0.3), ExpertBias("proportional", rate=0.01)]
            with quiet():
                balancer = Balancer(model, policies)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, foreach=False)
            for seed in (0, 1):
                given = inputs(seed)
                labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
                positions = torch.tensor([0, 1, 2, 0, 1, 2]).expand(3, 6)
                loss = model(**given, position_ids=positions, labels=labels).loss
                balancer.tap(loss).backward()
                gradient = {name: held(one) for name, one in gradients(model).items()}
                optimizer.step()
                optimizer.zero_grad()
                found.append([gradient, balancer.metrics(), *map(held, balancer.load())])
            found[-1] += [held(layer.router.expert_bias) for layer in balancer._layers]
    assert equal(found[:2], found[2:])


@pytest.mark.parametrize("policies", [[], [AuxLoss()]])
def test_parameters_that_are_loaded_for_each_forward_are_refused(policies):
    pytest.importorskip("transformers")
    accelerate = pytest.importorskip("accelerate")
    from integrations.hf.families import build

    model: Any = accelerate.cpu_offload(build("qwen3_moe"), execution_device="cpu")
    with pytest.raises(ConfigError, match="loads from CPU or disk for each forward"):
        Balancer(model, policies)
    whole: Any = accelerate.dispatch_model(build("qwen3_moe"), {"": "cpu"}, force_hooks=True)  # what it says to do
    Balancer(whole, policies)


def _all_there(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    from torch.utils._pytree import tree_map

    return tree_map(lambda x: x.to(SECOND) if isinstance(x, Tensor) else x, (args, kwargs))
