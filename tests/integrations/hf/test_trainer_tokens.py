"""What a Trainer's step is divided by: counted ahead where a batch is what the model gets, and else left open."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the hf extra is not installed")
pytest.importorskip("accelerate", reason="the hf extra is not installed")

from transformers import Trainer

from _rounding import OURS, distance
from equipoise import ConfigError, StateError, devices
from equipoise.adapters.hf import BalanceCallback
from equipoise.adapters.trainers import changes_batches
from integrations.hf._trainer import Text, in_order
from integrations.hf._trl import balanced, plain, wanted

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]


class Longer(Trainer):
    """Its batches grow on their way, as on-policy ones do, by other tokens in each step."""

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        ids, more = inputs["input_ids"], 1 + self.state.global_step % 3
        inputs["input_ids"] = torch.cat([ids, ids[:, :more]], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, :more])], dim=1)
        inputs["labels"] = torch.cat([inputs["labels"], ids[:, :more]], dim=1)
        return super().training_step(model, inputs, num_items_in_batch)


class Adds(Trainer):
    """Its loss puts two tokens before each row, as those of a picture."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        two = {"input_ids": 5, "attention_mask": 1, "labels": -100}
        for key, value in two.items():
            inputs[key] = torch.nn.functional.pad(inputs[key], (2, 0), value=value)
        return super().compute_loss(model, inputs, *args, **kwargs)


class Short(Trainer):
    """What it counts is right in its first step only."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step:
            inputs = {key: value[:, 1:] for key, value in inputs.items()}
        return super().compute_loss(model, inputs, *args, **kwargs)


class ByHand(Trainer):
    """A step of its own, without accelerate."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs)) / self.current_gradient_accumulation_steps
        loss.backward()
        return loss.detach()


def of(kind: type) -> Any:
    """How ``hf._trl`` makes one."""

    def make(model: Any, settings: dict[str, Any], callbacks: list) -> Any:
        from transformers import TrainingArguments

        known = {k: v for k, v in settings.items() if k in TrainingArguments.__dataclass_fields__}
        args = TrainingArguments(**known, eval_strategy="no")
        return in_order(kind)(model, args, train_dataset=Text(), eval_dataset=Text(), callbacks=callbacks)

    return make


def compared(kind: type, *, counted: bool, accumulate: int = 2, **options: Any) -> Any:
    """The callback's gradient is the law's."""
    bare = plain(of(kind), accumulate)
    assert all(len(set(bare.tokens(step))) > 1 for step in range(2)), "all laws would be the same"
    got = balanced(of(kind), accumulate, options)
    want = wanted(of(kind), accumulate, bare, counted=counted)
    assert max(distance(*pair) for pair in zip(got.gradients, want.gradients, strict=True)) < OURS
    return got


def test_a_batch_that_stays_what_it_is():
    """B60: every token of a step weighs the same."""
    assert "counted in the batches" in compared(Trainer, counted=True).callback.describe()


def test_batches_that_may_change_on_their_way():
    """Nothing is declared that might be wrong, and it is said what that makes of the law, and why."""
    with pytest.warns(UserWarning, match=r"every micro-batch weighs the same.*Longer.training_step may change") as seen:
        got = compared(Longer, counted=False)
    assert len([w for w in seen if "weighs the same" in str(w.message)]) == 1
    assert "Longer.training_step may change a batch" in got.callback.describe().replace("\n              ", " ")


def test_a_loss_that_adds_tokens_is_found_out_at_its_first_micro_batch():
    with pytest.warns(UserWarning, match=r"tokens in the first batch, and the routers saw \d+"):
        compared(Adds, counted=False)
    with pytest.warns(UserWarning, match="weighs the same"):  # not where one pass is the step: both are the same
        balanced(of(Adds), 2, steps=1)
    balanced(of(Adds), 1, steps=1)


def test_a_function_counts_what_a_loss_adds():
    compared(Adds, counted=True, tokens=lambda batch: batch["attention_mask"].sum() + 2 * len(batch["input_ids"]))


@pytest.mark.parametrize("hands", [{"cpu"}, set()], ids=["cpu", "gpu"])
@pytest.mark.parametrize(("kind", "options"), [(Short, {}), (Longer, {"tokens": "counted"})])
def test_a_number_that_is_wrong_after_all(monkeypatch, hands, kind, options):
    """The remedy is one that a callback's user can do, and works; on a GPU, too, where it comes a step later."""
    monkeypatch.setattr(devices, "HOST_READABLE", hands)
    with pytest.raises(StateError, match="as counted in its batches") as error:
        balanced(of(kind), 2, options, steps=4)
    assert "begin_step" not in str(error.value) and 'tokens="micro_batch"' in error.value.do
    monkeypatch.undo()
    if kind is Short and hands:
        compared(kind, counted=False, tokens="micro_batch")


def test_a_step_without_accelerate_is_told_what_to_call():
    with pytest.raises(StateError, match=re.escape("self.accelerator.backward(loss)")) as error:
        balanced(of(ByHand), 2)
    assert "balancer.tap" not in str(error.value)


def test_a_word_that_is_not_known():
    with pytest.raises(ConfigError, match="'counted', 'micro_batch' or a function"):
        BalanceCallback([], tokens="some")


class ForwardPasses(Trainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().training_step(*args, **kwargs)


class Looks(Trainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self.rows = len(inputs["input_ids"]) if "input_ids" in inputs else inputs["inputs_embeds"].shape[0]
        return super().training_step(model, inputs, num_items_in_batch=num_items_in_batch)


class Own(Trainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        return loss.detach()


class Helps(Trainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self.mangle(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def mangle(self, inputs: Any) -> None:
        inputs["input_ids"] = inputs["input_ids"][:, 1:]


class Makes(Trainer):
    def _prepare_inputs(self, inputs: Any) -> Any:
        return super()._prepare_inputs({"input_ids": inputs["input_ids"][:, 1:]})


class MakesAnother(Trainer):
    def _prepare_inputs(self, inputs: Any) -> Any:
        return {"input_ids": inputs["input_ids"][:, 1:]}


class Pops(Trainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        args[1].pop("attention_mask")
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize("kind", [Trainer, ForwardPasses, Looks, Own, Adds])
def test_methods_that_leave_the_batch_alone(kind):
    assert changes_batches(object.__new__(kind)) == ""


@pytest.mark.parametrize("kind", [Longer, Helps, Makes, MakesAnother, Pops])
def test_methods_that_may_change_it(kind):
    method = "_prepare_inputs" if kind.__name__.startswith("Makes") else "training_step"
    assert changes_batches(object.__new__(in_order(kind))) == f"{kind.__name__}.{method}"
