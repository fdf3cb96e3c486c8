"""Situations of a fine-tuning that meet in one run: each trainer of TRL in all of them at once."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("peft", reason="PEFT is not installed")

import os
import shutil
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    FineGrainedFP8Config,
    PreTrainedModel,
    Trainer,
)

from _rounding import OURS, distance
from equipoise import ExpertBias
from equipoise.adapters.hf import BalanceCallback, load_biases
from integrations.hf._trl import FAMILY, balanced, plain, rewarding, wanted
from integrations.hf.families import build
from integrations.hf.test_trainer_tokens import of
from unit.lab.models.test_quantised import fp8, set_quantised

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
pytestmark = [
    pytest.mark.xdist_group("ranks"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore:every micro-batch weighs the same"),
    pytest.mark.filterwarnings("ignore:ExpertBias moves biases"),
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
COUNTED = ["sft", "dpo", "kto", "reward"]
ALL = [*COUNTED, "grpo", "rloo", "distillation"]


def lora(model: Any) -> Any:
    """An adapter that changes what routers choose, and trains them."""
    from peft import LoraConfig, get_peft_model

    task = "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM"
    options = {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["gate.weight"], "task_type": task}
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **options)).double()


def bias() -> Any:
    return ExpertBias("proportional", rate=0.2)


def choices(model: Any) -> list[Tensor]:
    """Of every router, for the same words, in evaluation mode."""
    model, seen = model.eval(), []
    routers = [m for m in model.modules() if type(m).__name__.endswith("TopKRouter")]
    hooks = [m.register_forward_hook(lambda _m, _a, out: seen.append(out[2])) for m in routers]
    with torch.no_grad():
        model(torch.arange(3, 63).view(6, 10))
    for hook in hooks:
        hook.remove()
    return seen


def quantised(kind: str, folder: Any) -> None:
    """Two folders: experts in fp8, and plain ones of what they mean."""
    net = rewarding().float() if kind == "reward" else build(FAMILY)
    net.save_pretrained(folder / "plain")
    stored, meant, settings = fp8(load_file(folder / "plain" / "model.safetensors"))
    assert len(stored) > len(meant), "nothing is quantised"
    shutil.copytree(folder / "plain", folder / "fp8")
    save_file(meant, folder / "plain" / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, folder / "fp8" / "model.safetensors", metadata={"format": "pt"})
    set_quantised(folder / "fp8", settings)


def read(kind: str, folder: Any) -> Any:
    """What a CPU can do: transformers makes plain weights of fp8 as it reads them."""
    auto = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    more = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if folder.name == "fp8" else {}
    net = auto.from_pretrained(folder, dtype=torch.float32, **more).double()
    net.set_experts_implementation("eager")
    return net


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k == "sft" else [pytest.mark.full]) for k in ALL])
def test_all_of_it_at_once(kind, tmp_path):
    """Accumulation, checkpointing, evaluation and a checkpoint between the steps; an adapter whose routers train.

    It trains on fp8 weights; those of the reference are what they mean.
    """
    quantised(kind, tmp_path)
    weights = read(kind, tmp_path / "plain").state_dict()
    nets = iter([read(kind, tmp_path / "fp8") for _ in range(3)])  # not made amid what makes all of it float64

    def meant(net: Any) -> Any:
        net.load_state_dict(weights)
        return lora(net)

    same: dict[str, Any] = {"narrow": True, "biased": True, "gradient_checkpointing": True}
    counted, between = kind in COUNTED, {"evaluates": True}
    if not counted:  # what is generated depends on what was before
        same, between = same | between, {}
    reference = same | {"prepare": meant}
    bare = plain(kind, 2, callbacks=[BalanceCallback([bias()])], **reference) if counted else None
    want = wanted(kind, 2, bare, counted=counted, callbacks=[BalanceCallback([bias()])], **reference)
    same |= between | {"also": [bias()], "save_strategy": "steps", "save_steps": 1}
    same |= {"prepare": lambda _: lora(next(nets))}
    got = balanced(kind, 2, folder=str(tmp_path), **same)
    for found, right in zip(got.gradients, want.gradients, strict=True):
        assert any("gate" in name for name in found) and distance(found, right) < OURS
    assert bare is None or min(map(distance, bare.gradients, want.gradients)) > 0.01
    evaluated = [entry for entry in got.trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 2 and all(entry["eval_balance/tokens"] > 0 for entry in evaluated)

    again = balanced(kind, 2, folder=str(tmp_path / "new"), resume=str(tmp_path / "checkpoint-1"), **same)
    assert len(again.gradients) == 1 and distance(again.gradients[0], got.gradients[1]) < OURS

    trained = choices(got.trainer.model)
    assert all(map(torch.equal, choices(again.trainer.model), trained))
    served = PeftModel.from_pretrained(next(nets), tmp_path / "checkpoint-2")
    assert not all(map(torch.equal, choices(served), trained)), "the biases change nothing"
    load_biases(served, tmp_path / "checkpoint-2")
    assert len(trained) == 2 and all(map(torch.equal, choices(served), trained))


def test_an_adapter_on_weights_read_from_fp8(tmp_path):
    """The same of the Trainer alone."""
    quantised("Trainer", tmp_path)
    weights, net = read("Trainer", tmp_path / "plain").state_dict(), read("Trainer", tmp_path / "fp8")

    def meant(other: Any) -> Any:
        other.load_state_dict(weights)
        return lora(other)

    bare = plain(of(Trainer), 2, prepare=meant)
    want = wanted(of(Trainer), 2, bare, counted=True, prepare=meant)
    got = balanced(of(Trainer), 2, prepare=lambda _: lora(net))
    for found, right, without in zip(got.gradients, want.gradients, bare.gradients, strict=True):
        assert distance(found, right) < OURS < 0.01 < distance(without, right)


class Wrapper(PreTrainedModel):
    """Hands on what it was given by position, and with ``pictures`` tokens of its own before the words."""

    _supports_sdpa = True

    def __init__(self, llm: Any, pictures: int) -> None:
        super().__init__(llm.config)
        self.llm, self.pictures = llm, pictures
        size = (pictures, llm.config.hidden_size)
        self.picture = torch.nn.Parameter(torch.linspace(-1, 1, size[0] * size[1], dtype=torch.float64).view(size))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> Any:
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not self.pictures:
            out = self.llm(input_ids, attention_mask)
        else:
            words = self.llm.get_input_embeddings()(input_ids)
            whole = torch.cat([self.picture.expand(len(words), -1, -1), words], dim=1)
            mask = torch.nn.functional.pad(attention_mask, (self.pictures, 0), value=1)
            out = self.llm(inputs_embeds=whole, attention_mask=mask)
        if out.logits.dim() == 3:  # of every token, and no reward
            out.logits = out.logits[:, self.pictures :].contiguous()
        if labels is not None:
            out.loss = self.llm.loss_function(out.logits, labels, self.config.vocab_size)
        return out


@pytest.mark.parametrize("pictures", [0, 5], ids=["by position", "pictures"])
@pytest.mark.parametrize("kind", ["Trainer", "reward"])
def test_a_wrapper_of_the_model(kind, pictures):
    """Its tokens are those that routers see, with the mask of the call inside. TRL's losses of words take none."""
    count = {"tokens": lambda batch: batch["attention_mask"].sum() + pictures * len(batch["input_ids"])}
    made = of(Trainer) if kind == "Trainer" else kind
    same: dict[str, Any] = {"prepare": lambda llm: Wrapper(llm, pictures)}
    bare = plain(made, 2, **same)
    want = wanted(made, 2, bare, counted=True, **same)
    got = balanced(made, 2, count if pictures else {}, **same)
    for found, right, without in zip(got.gradients, want.gradients, bare.gradients, strict=True):
        assert distance(found, right) < OURS < 0.01 < distance(without, right)
    assert len(set(bare.tokens(1))) > 1, "both laws would be the same"
