"""LoRA in the Trainer: frozen routers are left alone and we say so, trained ones obey the law, biases have a file."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="PEFT is not installed")
pytest.importorskip("accelerate", reason="the hf extra is not installed")

from _rounding import Float64, allowed, distance
from equipoise.adapters.hf import load_biases
from integrations.hf._cases import double
from integrations.hf._trainer import checkpoint, make
from integrations.hf._trainer_reference import POLICIES, check, expected, policies_for
from integrations.hf.families import build

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]
STILL: dict[str, Any] = {"learning_rate": 0.0, "optim": "sgd"}


def lora(**options: Any) -> Any:
    """A function that puts the same adapter on a model each time, none of its matrices zero."""

    def prepare(net: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(3)
        return get_peft_model(net, LoraConfig(r=4, init_lora_weights=False, **options))

    return prepare


ATTENTION = lora(target_modules=["q_proj", "o_proj"])
ROUTERS = {
    "target_parameters": lora(target_modules=["o_proj"], target_parameters=["gate.weight"]),
    "modules_to_save": lora(target_modules=["o_proj"], modules_to_save=["gate"]),
}


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_frozen_routers(tmp_path, family):
    """B48: nothing is pushed, no bias moves, the gradient is that of training without us; loads are still measured."""
    trainer, recorder = make(policies_for(family), 4, 2, 1, str(tmp_path), **STILL, family=family, prepare=ATTENTION)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.warns(UserWarning, match="every router of this model is frozen"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    plain, other = make([], 4, 2, 1, str(tmp_path), **STILL, family=family, prepare=ATTENTION)
    plain.remove_callback(other.balance)
    plain.remove_callback(other.record)
    gradients: list[dict[str, torch.Tensor]] = []
    plain.add_callback(last_gradients(gradients))
    plain.train()
    for name, gradient in gradients[0].items():
        assert torch.allclose(recorder.gradients[0][name], gradient, rtol=0, atol=1e-6 * float(gradient.abs().max()))
    assert trainer.state.log_history[0]["balance/maxvio_global"] > 0


def last_gradients(into: list[Any]) -> Any:
    from transformers import TrainerCallback

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            named = kwargs["model"].named_parameters()
            into.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    return Keep()


@pytest.mark.filterwarnings("ignore:ExpertBias moves biases")
@pytest.mark.parametrize("how", sorted(ROUTERS))
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_trained_routers_obey_the_law(tmp_path, family, how):
    want = expected(family, prepare=ROUTERS[how])
    trainer, recorder = make(policies_for(family), 2, 4, 2, str(tmp_path), **STILL, family=family, prepare=ROUTERS[how])
    trainer.train()
    check(recorder.result(trainer), want)
    assert any("gate" in name for name in recorder.gradients[0])


def test_an_adapters_biases_are_kept_beside_it(tmp_path):
    """B37, B50: an adapter's files hold no bias: we say so at the start, resume with it, and put it back afterwards."""
    from peft import PeftModel
    from safetensors import safe_open

    family, bias = "deepseek_v3", {"kind": "bias", "rule": "proportional", "rate": 0.5}
    prepare = ROUTERS["target_parameters"]
    given = {**STILL, "family": family, "prepare": prepare, "save_strategy": "steps", "save_steps": 2}
    trainer, recorder = make([bias], 4, 2, 4, str(tmp_path), **given)
    with pytest.warns(UserWarning, match=r"a LoRA adapter do not hold.*load_biases"):
        trainer.train()
    with safe_open(f"{checkpoint(tmp_path, 4)}/adapter_model.safetensors", "pt") as file:
        assert not any("correction_bias" in name for name in file.keys())  # noqa: SIM118
    again, second = make([bias], 4, 2, 4, str(tmp_path / "again"), **given)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ExpertBias moves biases")
        again.train(resume_from_checkpoint=checkpoint(tmp_path, 2))
    assert second.loads == recorder.loads[2:]
    ids = torch.arange(3, 43).view(4, 10)
    with torch.no_grad():
        want = trainer.model.eval()(ids).logits
        served = PeftModel.from_pretrained(build(family), checkpoint(tmp_path, 4)).merge_and_unload().eval()
        assert not torch.allclose(served(ids).logits, want, atol=1e-3)
        load_biases(served, checkpoint(tmp_path, 4))
        assert distance({"logits": served(ids).logits}, {"logits": want}) <= logits_rounding(family, ids)


def logits_rounding(family: str, ids: torch.Tensor) -> float:
    """A merged adapter rounds its weights anew: what the plain model's logits are off by is allowed."""
    plain, wide = build(family).eval(), double(build(family)).eval()
    with Float64():
        logits = wide(ids).logits
    return allowed({"logits": plain(ids).logits}, {"logits": logits})


def test_a_copied_router_has_its_bias_in_the_adapter(tmp_path):
    """PEFT saves modules_to_save whole: there is nothing to say."""
    given = {**STILL, "family": "deepseek_v3", "prepare": ROUTERS["modules_to_save"]}
    trainer, recorder = make([{"kind": "bias", "rate": 0.1}], 4, 2, 1, str(tmp_path), **given)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ExpertBias moves biases")
        trainer.train()
    assert all(bias.any() for n, bias in recorder.biases[0].items() if "modules_to_save" in n)


def test_a_reference_model_inside_the_step(tmp_path):
    """B48, B27: the model without its adapter, run without gradient as DPO does, is neither counted nor pushed."""
    from transformers import Trainer

    class WithReference(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            inside = self.accelerator.unwrap_model(model)
            with torch.no_grad(), inside.disable_adapter():
                before = inside(**inputs).logits
            loss = super().compute_loss(model, dict(inputs), *args, **kwargs)
            with torch.no_grad(), inside.disable_adapter():
                assert torch.equal(inside(**inputs).logits, before)
            return loss

    prepare = ROUTERS["target_parameters"]
    given = {**STILL, "family": "qwen3_moe", "prepare": prepare, "kind": WithReference}
    trainer, recorder = make(POLICIES, 2, 4, 2, str(tmp_path), **given)
    trainer.train()
    check(recorder.result(trainer), expected("qwen3_moe", prepare=prepare))


@pytest.mark.filterwarnings("ignore:ExpertBias moves biases")
def test_an_adapter_of_any_name_finds_its_biases(tmp_path):
    """PEFT saves one that is not called "default" in a folder of its own; ours lies beside it, for routers by name."""
    from peft import LoraConfig, PeftModel, get_peft_model

    def prepare(net: Any) -> Any:
        return get_peft_model(net, LoraConfig(r=4, target_modules=["o_proj"], modules_to_save=["gate"]), "policy")

    bias = {"kind": "bias", "rule": "proportional", "rate": 0.5}
    given = {"family": "qwen3_moe", "prepare": prepare, "save_strategy": "steps", "save_steps": 2}
    trainer, _ = make([bias], 4, 2, 2, str(tmp_path), **given)
    trainer.train()
    folder, ids = checkpoint(tmp_path, 2), torch.arange(3, 43).view(4, 10)
    with torch.no_grad():
        want = trainer.model.eval()(ids).logits
        plain = PeftModel.from_pretrained(build("qwen3_moe"), f"{folder}/policy").eval()
        assert not torch.allclose(plain(ids).logits, want, atol=1e-3)
        for name, place, merged in [
            ("policy", folder, False),
            ("default", f"{folder}/policy", False),
            ("other", folder, True),
            ("policy", f"{folder}/policy", True),
        ]:
            served: Any = PeftModel.from_pretrained(build("qwen3_moe"), f"{folder}/policy", adapter_name=name)
            served = (served.merge_and_unload() if merged else served).eval()
            load_biases(served, place)
            allowed = logits_rounding("qwen3_moe", ids) if merged else 0.0
            assert distance({"logits": served(ids).logits}, {"logits": want}) <= allowed
    resumed, recorder = make([bias], 4, 2, 3, str(tmp_path / "again"), **given)
    resumed.train(resume_from_checkpoint=folder)
    assert recorder.balance.balancer.step_count == 3
