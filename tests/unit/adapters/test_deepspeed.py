"""DeepSpeed's adapters where DeepSpeed is not: imports, refusals, and when an engine's step is one."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from equipoise import AuxLoss, Balancer, ConfigError, ExpertBias, MoE
from equipoise.adapters.deepspeed import DeepSpeedBalancer
from equipoise.adapters.deepspeed_engine import EngineSteps, check_engine


def test_without_policies_nothing_begins():
    with pytest.raises(ConfigError, match=r"none\n.*policies=\[\] measures and changes nothing"):
        DeepSpeedBalancer(nn.Linear(2, 2), None)


@pytest.mark.parametrize("policies", [[], "global", ["global+micro"]])
def test_without_deepspeed_it_says_which_release_was_tried(policies, monkeypatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match=r"DeepSpeed, tried with 0\.19\.8\n.*\n.*pip install deepspeed==0\.19\.8"):
        DeepSpeedBalancer(nn.Linear(2, 2), policies)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.19.8")


def test_what_is_no_engine_is_refused(installed):
    with pytest.raises(ConfigError, match=r"a Linear\n.*what deepspeed\.initialize returned first"):
        DeepSpeedBalancer(nn.Linear(2, 2), [])


class DeepSpeedEngine:
    """As much of it as an adapter asks: accumulation, steps that may be skipped, gradients moved away."""

    sequence_parallel_size, zenflow, torch_autocast_z0_gradscaler = 1, False, None

    def __init__(self, module: Any, micro_batches: int = 2, **zero: Any) -> None:
        zero = {"offload_optimizer": None, "offload_param": None, "zero_hpz_partition_size": 1} | zero
        self.module, self._config = module, SimpleNamespace(zero_config=SimpleNamespace(**zero))
        self.micro_batches, self.micro_steps, self.infinite = micro_batches, 0, False
        self.kept = {name: torch.zeros_like(p) for name, p in module.named_parameters()}

    def zero_optimization_stage(self) -> int:
        return 2

    def autotp_size(self) -> int:
        return 1

    def is_deepcompile_enabled(self) -> bool:
        return False

    def random_ltd_enabled(self) -> bool:
        return False

    def managed_gradient_accumulation(self) -> bool:
        return True

    def is_gradient_accumulation_boundary(self) -> bool:
        return (self.micro_steps + 1) % self.micro_batches == 0

    def was_step_applied(self) -> bool:
        return not self.infinite

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.micro_batches).backward()
        for name, p in self.module.named_parameters():
            self.kept[name] += 0 if p.grad is None else p.grad
            p.grad = None

    def step(self) -> None:
        if self.is_gradient_accumulation_boundary() and not self.infinite:
            with torch.no_grad():
                for name, p in self.module.named_parameters():
                    p -= 0.1 * self.kept[name]
                    self.kept[name].zero_()
        self.micro_steps += 1


def balanced(policies: list[Any]) -> tuple[DeepSpeedEngine, Balancer]:
    torch.manual_seed(0)
    engine = DeepSpeedEngine(MoE(dim=8, hidden=16, num_experts=4, top_k=2, gate="sigmoid"))
    steps = EngineSteps(engine)
    balancer = Balancer(engine.module, policies, optimizer=steps)
    balancer._kept = steps  # type: ignore[attr-defined]  # as an adapter keeps it
    theirs = engine.step
    engine.step = lambda: steps.around(theirs)
    return engine, balancer


def micro_batch(engine: DeepSpeedEngine, balancer: Balancer, seed: int) -> None:
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(seed))
    engine.backward(balancer.tap(engine.module(x).square().mean()))
    engine.step()


def test_gradients_that_an_engine_moves_away_are_not_dropped(installed):
    """And weights that move at its step alone are no surprise; nothing has to be declared."""
    engine, balancer = balanced([AuxLoss("global_batch", coef=1e-2)])
    for step in range(3):
        micro_batch(engine, balancer, 2 * step)
        assert balancer.step_count == step
        micro_batch(engine, balancer, 2 * step + 1)
        assert balancer.step_count == step + 1
        assert balancer.metrics()["balance/tokens"] == 24
        assert balancer.metrics()["balance/skipped_steps"] == 0
    assert "a step of DeepSpeed's engine (ZeRO 2)" in " ".join(balancer.describe().split())


def test_a_step_that_it_skips_moves_no_bias(installed):
    engine, balancer = balanced([ExpertBias(rate=1e-2)])
    engine.infinite = True
    for seed in range(2):
        micro_batch(engine, balancer, seed)
    assert balancer.step_count == 0 and not bool(engine.module.gate.expert_bias.any())
    engine.infinite = False
    for seed in range(2):
        micro_batch(engine, balancer, seed)
    assert balancer.step_count == 1 and bool(engine.module.gate.expert_bias.any())
    assert balancer.metrics()["balance/skipped_steps"] == 1
    assert balancer.metrics()["balance/tokens"] == 24


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"sequence_parallel_size": 2}, "sequences cut over 2 ranks"),
        ({"autotp_size": lambda: 4}, "tensor parallelism of 4"),
        ({"zenflow": True}, "zenflow"),
        ({"is_deepcompile_enabled": lambda: True}, "deepcompile"),
        ({"torch_autocast_z0_gradscaler": object()}, "torch_autocast in fp16 with ZeRO 0"),
        ({"random_ltd_enabled": lambda: True}, "random_ltd"),
    ],
)
def test_what_no_test_has_run_is_refused_by_name(attributes, words):
    engine = DeepSpeedEngine(nn.Linear(2, 2))
    check_engine(engine)
    vars(engine).update(attributes)
    with pytest.raises(ConfigError, match=words):
        check_engine(engine)


@pytest.mark.parametrize("name", ["zero_hpz_partition_size", "mics_shard_size"])
def test_zero_in_groups_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name}: 2"):
        check_engine(DeepSpeedEngine(nn.Linear(2, 2), **{name: 2}))


def test_offload_is_warned_of():
    with pytest.warns(UserWarning, match="offload_optimizer of DeepSpeed: no test of equipoise has run it"):
        check_engine(DeepSpeedEngine(nn.Linear(2, 2), offload_optimizer=object()))
