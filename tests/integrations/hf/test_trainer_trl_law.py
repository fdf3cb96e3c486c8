"""Every trainer of TRL that needs no server: its balance gradient is the law's, whatever it divides its loss by."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("peft", reason="PEFT is not installed")

import os
from typing import Any

from _rounding import OURS, distance
from integrations.hf._trl import KINDS, MADE, Run, balanced, plain, wanted

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
pytestmark = [
    pytest.mark.xdist_group("ranks"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore:this model's own balance loss"),
    pytest.mark.filterwarnings("ignore:every micro-batch weighs the same"),
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
OPEN = MADE | {"cpo", "orpo"}  # the last two join pairs behind the collator: their batches have no input_ids
QUICK = {("grpo_dapo", 2), ("gkd_on", 2)}
CUTS = [(kind, 4) for kind in KINDS]
CUTS += [(kind, m) for kind in ("sft", "dpo", "kto", "reward", "grpo", "grpo_dapo", "rloo", "gkd_on") for m in (1, 2)]


def compared(kind: str, accumulate: int, reference: dict[str, Any] | None = None, **more: Any) -> Run:
    """``reference``: settings of the training that ``balanced``, with ``more``, has to be equal to."""
    same = reference or {}
    bare = plain(kind, accumulate, **same)
    want = wanted(kind, accumulate, bare, counted=kind not in OPEN, **same)
    got = balanced(kind, accumulate, **same | more)
    for step, (found, right, without) in enumerate(zip(got.gradients, want.gradients, bare.gradients, strict=True)):
        assert found.keys() == right.keys()
        assert distance(found, right) < OURS
        assert distance(without, right) > 0.01, "nothing was pushed"
        assert got.logs[step]["balance/tokens"] == sum(bare.tokens(step))
    if accumulate == 4 and kind != "sft_packed":
        assert len(set(bare.tokens(1))) > 1, "both laws would be the same"
    return got


@pytest.mark.parametrize(
    ("kind", "accumulate"),
    [pytest.param(*cut, marks=[] if cut in QUICK else [pytest.mark.full]) for cut in CUTS],
)
def test_every_trainer(kind, accumulate):
    """B07, B10, B20: divided by M after the loss is made (DPO), before (GRPO), by tokens (SFT), or not at all."""
    got = compared(kind, accumulate)
    law = "every micro-batch weighs the same" if kind in OPEN else "counted in the batches"
    assert law in got.callback.describe()


def lora(model: Any) -> Any:
    """An adapter with trained routers: without it the same model is the reference."""
    from peft import LoraConfig, get_peft_model

    options = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["gate"], "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=4, **options)).double()


@pytest.mark.full
@pytest.mark.parametrize("kind", ["dpo", "grpo_dapo"])
def test_recomputed(kind):
    """TRL checkpoints gradients by default; passes of a reference run between forward and recompute."""
    compared(kind, 2, {"narrow": True}, gradient_checkpointing=True)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["grpo_dapo", "gkd_on"])
def test_an_adapter_whose_base_is_the_reference(kind):
    """B48: passes without the adapter have no gradient, and count nothing."""
    compared(kind, 2, {"prepare": lora})


@pytest.mark.full
@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "grpo", "rloo"])
def test_trls_own_loss_is_off_and_comes_back(kind):
    """B75: on unless told otherwise; the gradient is the one without it, and the Trainer has it back afterwards."""
    got = compared(kind, 2, router_aux_loss_coef=0.01)
    assert got.trainer.aux_loss_enabled


@pytest.mark.full
@pytest.mark.parametrize("kind", ["gkd_on"])
def test_resumed(kind, tmp_path):
    """The third step of a run that was cut behind its second is that of the run: f of the step before came back."""
    whole = balanced(kind, 2, steps=3, folder=str(tmp_path), save_strategy="steps", save_steps=2)
    again = balanced(kind, 2, steps=3, folder=str(tmp_path / "new"), resume=str(tmp_path / "checkpoint-2"))
    assert len(again.gradients) == 1
    assert again.logs[2]["balance/policy_1/loss"] == pytest.approx(whole.logs[2]["balance/policy_1/loss"], rel=OURS)
    assert distance(again.gradients[0], whole.gradients[2]) < OURS
