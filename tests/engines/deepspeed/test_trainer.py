"""transformers' Trainer under DeepSpeed, ZeRO 0 to 3 on CPUs: law, loads, biases, resume, skipped steps, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from _rounding import part_distance
from engines._ranks import free_port, train_ranks
from integrations.hf._trainer_reference import POLICIES, expected

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]


def train(folder: Path, cases: dict[str, Any], ranks: int = 1) -> list[dict[str, Any]]:
    return train_ranks(Path(__file__).with_name("record_trainer.py"), folder, cases, ranks, meet=free_port())


STAGES = (0, 1, 2, 3)
COEF = 5.0  # far above the rounding of the language model's gradient, which is subtracted
STRONG = [one | {"coef": COEF} for one in POLICIES]
BIAS = [{"kind": "bias", "rate": 0.005}]
LEARNS = {"arguments": {"learning_rate": 1e-2, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}}


@pytest.fixture(scope="module")
def want():
    return expected("qwen3_moe", coef=COEF)


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def of_law(request, tmp_path_factory):
    cases: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        cases[f"plain {stage}"] = {"stage": stage}
        cases[f"balanced {stage}"] = {"stage": stage, "policies": STRONG}
        cases[f"recompute {stage}"] = {"stage": stage, "policies": STRONG, "recompute": True}
    return train(tmp_path_factory.mktemp("law"), cases, request.param)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_balance_part_of_the_gradient_is_the_law(of_law, want, stage, recompute):
    """In two steps of two micro-batches of uneven rows; the second is pushed by the loads of the first."""
    for of_rank in of_law:
        plain, got = of_rank[f"plain {stage}"], of_rank[f"{'recompute' if recompute else 'balanced'} {stage}"]
        assert got["loads"] == want.loads
        for step in range(2):
            law, fp32 = (want.gradients[step], want.bare[step]), (want.narrow.gradients[step], want.narrow.bare[step])
            for part in ("", "mlp.gate"):
                own = part_distance(*law, *fp32, part)  # of plain autograd on this machine: 4e-7 to 7e-7
                off = part_distance(*law, got["gradients"][step], plain["gradients"][step], part)
                assert off < max(1e-6, 2 * own) < 1e-5
        for i, value in enumerate(want.values[1]):
            assert got["logs"][1][f"balance/policy_{i}/loss"] == pytest.approx(value, rel=1e-5)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    both = {"policies": [*POLICIES, *BIAS], "family": "deepseek_v3", "steps": 4}
    half = {"config": {"bf16": {"enabled": True}}, "arguments": {"bf16": True}}
    infinite = {"config": {"fp16": {"enabled": True, "initial_scale_power": 32}}, "arguments": {"fp16": True}}
    cases: dict[str, dict[str, Any]] = {
        "fp16": {"stage": 1, "policies": POLICIES, "steps": 3, **infinite},
        "made partitioned": {"stage": 3, "policies": POLICIES, "init": True},
        "short last step": {"stage": 2, "policies": POLICIES, "accumulate": 3, "steps": 9},
        "bias that is a parameter 2": {"stage": 2, "policies": BIAS, "family": "ernie4_5_moe"},
        "bias that is a parameter 3": {"stage": 3, "policies": BIAS, "family": "ernie4_5_moe", "refused": True},
    }
    for stage in STAGES:
        saved = str(folder / f"saved-{stage}")
        again = {**both, **LEARNS, "stage": stage, "folder": saved}
        cases |= {
            f"plain {stage}": {"stage": stage, "steps": 3, **LEARNS},
            f"look {stage}": {"stage": stage, "steps": 3, **LEARNS, "policies": []},
            f"bias {stage}": {"stage": stage, "policies": BIAS, "family": "deepseek_v3"},
            f"whole {stage}": again,
            f"resumed {stage}": {**again, "resume": f"{saved}/checkpoint-2"},
        }
        if stage:
            cases[f"bf16 {stage}"] = {"stage": stage, "policies": BIAS, "family": "deepseek_v3", **half}
    return train(folder, cases, 2)


@pytest.mark.parametrize("stage", STAGES)
def test_looking_changes_no_bit(others, stage):
    for of_rank in others:
        plain, look = of_rank[f"plain {stage}"], of_rank[f"look {stage}"]
        assert all(torch.equal(plain["weights"][name], weight) for name, weight in look["weights"].items())
        assert len(look["loads"]) == 3
        assert look["hooks"] == []
        assert f"a step of DeepSpeed's engine (ZeRO {stage})" in " ".join(look["described"].split())


@pytest.mark.parametrize("stage", STAGES)
def test_the_bias_is_moved_once_a_step_by_the_load_of_all(others, stage):
    for of_rank in others:
        got = of_rank[f"bias {stage}"]
        for layer, name in enumerate(got["biases"][-1]):
            moved_E = torch.zeros(len(got["loads"][0][layer]), dtype=torch.float64)
            for step, loads in enumerate(got["loads"]):
                counts_E = torch.tensor(loads[layer], dtype=torch.float64)
                change_E = 0.005 * (counts_E.mean() - counts_E).sign()
                moved_E += change_E - change_E.mean()
                bias_E = got["biases"][step][name]
                assert bias_E.dtype == torch.float32
                torch.testing.assert_close(bias_E.double(), moved_E, rtol=0, atol=1e-7)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_the_bias_stays_in_fp32_where_deepspeed_trains_in_bf16(others, stage):
    for of_rank in others:
        got = of_rank[f"bf16 {stage}"]
        assert got["loads"] == others[0][f"bf16 {stage}"]["loads"]
        for bias_E in got["biases"][-1].values():
            assert bias_E.dtype == torch.float32
            assert bool((bias_E.bfloat16().float() != bias_E).any()), "what bf16 could not hold"


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_ends_with_the_same_bits(others, stage):
    for of_rank in others:
        whole, resumed = of_rank[f"whole {stage}"], of_rank[f"resumed {stage}"]
        assert resumed["loads"] == whole["loads"][2:]
        for name, bias_E in whole["biases"][-1].items():
            assert bool(bias_E.any()) and torch.equal(resumed["biases"][-1][name], bias_E)
        for name, weight in whole["weights"].items():
            assert torch.equal(resumed["weights"][name], weight)


def test_a_step_that_deepspeed_skips_is_none(others):
    """Three steps of infinite gradients: its global_steps count them, no weight has moved."""
    for of_rank in others:
        assert of_rank["fp16"]["skipped"] == 3
        assert of_rank["fp16"]["loads"] == []


def test_parameters_that_were_partitioned_as_they_were_made(others):
    tokens = [sum(layer) for step in others[0]["made partitioned"]["loads"] for layer in step]
    assert tokens == [sum(layer) for step in expected("qwen3_moe").loads for layer in step]


def test_a_last_step_of_fewer_micro_batches_is_a_step(others):
    """32 rows in micro-batches of one row on two ranks: five steps of three, and one of a single micro-batch."""
    loads = others[0]["short last step"]["loads"]
    assert len(loads) == 9
    assert sum(loads[5][0]) < 0.5 * min(sum(step[0]) for step in loads[:5])


def test_a_bias_that_zero_3_has_partitioned_is_refused(others):
    assert "train this model with ZeRO 0, 1 or 2" in others[0]["bias that is a parameter 3"]["error"]
    assert all(bool(one.any()) for one in others[0]["bias that is a parameter 2"]["biases"][-1].values())
