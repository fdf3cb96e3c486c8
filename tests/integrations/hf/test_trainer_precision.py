"""Mixed precision in the Trainer: GradScaler's factor does not reach the balance gradient, a skipped step no state."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the hf extra is not installed")
pytest.importorskip("accelerate", reason="the hf extra is not installed")

from transformers import TrainerCallback

from integrations.hf import _trainer_reference as reference
from integrations.hf._trainer import as_rank, checkpoint, make, train
from integrations.hf._trainer_reference import check, expected, policies_for

pytestmark = [
    pytest.mark.xdist_group("ranks"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step"),
]
STILL: dict[str, Any] = {"learning_rate": 0.0, "optim": "sgd"}
SCALE = 4096.0


class Overflow(TrainerCallback):
    """Gradients of one step are infinite, as fp16 makes them now and then."""

    def __init__(self, at: int = 2) -> None:
        self.steps, self.at = 0, at

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        for parameter in kwargs["model"].parameters():
            if self.steps == self.at and parameter.grad is not None:
                parameter.grad.mul_(float("inf"))


def scaled(folder: str, family: str, batch: int, accumulate: int, **arguments: Any) -> dict[str, Any]:
    """Three steps with a GradScaler, the second skipped; accelerate 1.15 has no scaler of its own on a CPU.

    Everything behind it is accelerate's: its backward, its optimizer that tells whether a step was skipped.
    """
    overflow = {"trainer": {"callbacks": [Overflow()]}}
    trainer, recorder = make(
        policies_for(family), batch, accumulate, 3, folder, **STILL, **overflow, family=family, **arguments
    )
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1000)
    trainer.train()
    result = recorder.result(trainer)
    factors = [SCALE, SCALE, SCALE / 2]  # the scaler halves after infinity
    result["gradients"] = [
        {name: g / factor for name, g in one.items()} for one, factor in zip(result["gradients"], factors, strict=True)
    ]
    return result


def scaled_rank(folder: str, family: str, batch: int, accumulate: int, arguments: dict) -> dict[str, Any]:
    with as_rank():
        return scaled(folder, family, batch, accumulate, **arguments)


def without_second(got: dict[str, Any]) -> dict[str, Any]:
    """Steps 1 and 3, as if the rows of step 2 had never come."""
    assert got["steps"][1] == got["steps"][0] and got["biases"][1].keys() == got["biases"][0].keys()
    for name, bias_E in got["biases"][1].items():
        assert torch.equal(bias_E, got["biases"][0][name]), "a skipped step moves no bias"
    logs = [entry for entry in got["logs"] if "loss" in entry]
    assert logs[1]["balance/tokens"] == logs[0]["balance/tokens"]
    return got | {"logs": [logs[0], logs[2]]} | {k: [got[k][0], got[k][2]] for k in ("steps", "gradients", "biases")}


@pytest.fixture(scope="module")
def wants() -> dict[str, Any]:
    """The first and the third eight rows."""
    batches = [reference.rows_of(0, 8), reference.rows_of(16, 8)]
    return {family: expected(family, batches=batches) for family in ("deepseek_v3", "mixtral")}


def test_a_gradscaler_and_a_step_that_it_skips(tmp_path, wants):
    got = scaled(str(tmp_path), "deepseek_v3", 2, 4)
    check(without_second(got), wants["deepseek_v3"])
    assert got["logs"][2]["balance/skipped_steps"] == 1


def test_the_first_step_after_a_resume_is_skipped(tmp_path):
    """There is no committed step to tell of then, and no reason to stop."""
    given = {**STILL, "family": "gpt_oss"}
    train(policies_for("gpt_oss"), 4, 2, 2, str(tmp_path), **given, save_strategy="steps", save_steps=2)
    overflow = {"trainer": {"callbacks": [Overflow(at=1)]}}
    trainer, recorder = make(policies_for("gpt_oss"), 4, 2, 4, str(tmp_path), **given, **overflow)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    trainer.remove_callback(recorder.record)
    trainer.train(resume_from_checkpoint=checkpoint(tmp_path, 2))
    third, fourth = [entry for entry in trainer.state.log_history if "loss" in entry and entry["step"] > 2]
    assert "balance/tokens" not in third
    assert fourth["balance/skipped_steps"] == 1 and fourth["balance/policy_1/loss"] > 0.9


@pytest.mark.parametrize("sharded", [pytest.param(False, marks=pytest.mark.full), True])
def test_on_two_ranks(ranks, tmp_path, wants, sharded):
    """FSDP2's parameters tell nothing of gradients that were dropped: the callback asks accelerate."""
    call = f"{scaled_rank.__module__}:{scaled_rank.__name__}"
    arguments = {"sharded": sharded}
    for got in ranks.run(call, str(tmp_path), "mixtral", 2, 2, arguments, size=2, timeout=120):
        assert got["sharded"] == sharded
        check(without_second(got), wants["mixtral"])


@pytest.mark.parametrize("family", ["deepseek_v3", pytest.param("qwen3_moe", marks=pytest.mark.full)])
def test_bf16_autocast(family):
    """The balance gradient alone (with a coefficient less without) in bf16, against float64: the same size."""
    policies = policies_for(family)
    none = [p | {"coef": 0.0} if p["kind"] == "aux" else p for p in policies]
    runs = [
        train(chosen, batch, accumulate, 2, **STILL, family=family, bf16=True)
        for chosen, batch, accumulate in ((policies, 8, 1), (none, 8, 1), (policies, 2, 4))
    ]
    whole, coef = expected(family), reference.COEF
    reference.COEF = 1e-12
    try:
        bare = expected(family)
    finally:
        reference.COEF = coef
    assert runs[0]["steps"] == runs[2]["steps"]
    (name,) = [n for n in whole.gradients[0] if n.endswith("layers.0.mlp.gate.weight")]
    for step in range(2):
        want = whole.gradients[step][name] - bare.gradients[step][name]
        for one in (runs[0], runs[2]):
            got = (one["gradients"][step][name] - runs[1]["gradients"][step][name]).double()
            # what a cosine of 0.99 leaves open; a factor of the scaler or of a cut is 2 or more
            assert float((got * want).sum() / want.square().sum()) == pytest.approx(1, abs=0.14), "its size"
            assert torch.cosine_similarity(got.flatten(), want.flatten(), 0) > 0.99, "its direction"
        assert [sum(layer) for layer in runs[0]["steps"][step]] == [sum(layer) for layer in whole.loads[step]]
        for bias_E in runs[0]["biases"][step].values():
            assert bias_E.dtype == torch.float32
