"""A callback's lives: one training after the other, ended in an error, inside each other, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the hf extra is not installed")
pytest.importorskip("accelerate", reason="the hf extra is not installed")

from transformers import TrainerCallback

from equipoise import Balancer, ConfigError, DataError, StateError
from equipoise.adapters.hf import BalanceCallback
from integrations.hf._trainer import HOOKED, make, model, policy
from integrations.hf._trainer_reference import POLICIES, check, expected
from integrations.hf.families import build

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]
STILL: dict[str, Any] = {"family": "qwen3_moe", "learning_rate": 0.0, "optim": "sgd"}


@pytest.fixture(scope="module")
def want():
    return expected("qwen3_moe")


def hooks(net: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def test_the_same_trainer_twice(tmp_path, want):
    """The second training is a new one: it knows no load of the first."""
    trainer, recorder = make(POLICIES, 4, 2, 2, str(tmp_path), **STILL)
    for _ in range(2):
        recorder.gradients.clear(), recorder.loads.clear(), recorder.biases.clear()
        trainer.train()
        result = recorder.result(trainer)
        check(result | {"logs": result["logs"][-3:]}, want)


def test_two_trainers_of_one_model_in_a_row(tmp_path, want):
    """The callback, too, may go from one to the other; nothing of it stays on the model."""
    net = build("qwen3_moe")
    before = hooks(net)
    trainer, recorder = make(POLICIES, 8, 1, 2, str(tmp_path), **STILL, model=net)
    trainer.train()
    check(recorder.result(trainer), want)
    assert hooks(net) == before
    other, second = make(POLICIES, 2, 4, 2, str(tmp_path), **STILL, model=net)
    other.train()
    check(second.result(other), want)
    assert hooks(net) == before
    callback = recorder.balance
    third, last = make(POLICIES, 2, 4, 1, str(tmp_path), **STILL, model=build("mixtral"))
    third.callback_handler.callbacks[third.callback_handler.callbacks.index(last.balance)] = callback
    last.balance = callback
    third.train()
    assert callback.balancer is not None and callback.balancer.step_count == 1


class Interrupt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:this model's own balance loss")
def test_a_training_that_was_interrupted_leaves_the_model_free(tmp_path, want):
    """As in a notebook: the cell is stopped, the model is as it was, and a new Trainer is made of it."""
    net = build("qwen3_moe", output_router_logits=True)
    first, _ = make(POLICIES, 4, 2, 2, str(tmp_path), **STILL, model=net, trainer={"callbacks": [Interrupt()]})
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert net.config.output_router_logits
    Balancer(net, []).remove()
    assert not set(HOOKED) & set(vars(first))
    second, recorder = make(POLICIES, 4, 2, 2, str(tmp_path), **STILL, model=net)
    net.zero_grad()
    second.train()
    check(recorder.result(second), want)


@pytest.mark.filterwarnings("ignore:this model's own balance loss")
def test_a_training_that_cannot_begin_leaves_the_model_free(tmp_path):
    net = build("qwen3_moe", output_router_logits=True)
    saves = {"save_strategy": "steps", "save_steps": 1}
    make(POLICIES, 4, 2, 1, str(tmp_path), **STILL, **saves, model=net)[0].train()
    (tmp_path / "checkpoint-1" / "balancer.equipoise").unlink()
    second, _ = make(POLICIES, 4, 2, 2, str(tmp_path), **STILL, model=net)
    with pytest.raises(DataError, match="the balancer's state in"):
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert net.config.output_router_logits
    Balancer(net, []).remove()
    assert not set(HOOKED) & set(vars(second))


def test_two_callbacks_in_one_trainer_are_refused(tmp_path):
    other = BalanceCallback([policy(POLICIES[0])])
    trainer, _ = make(POLICIES, 4, 2, 1, str(tmp_path), **STILL, trainer={"callbacks": [other]})
    with pytest.raises(StateError, match="one balancer per model"):
        trainer.train()


def test_a_training_inside_a_training_of_the_same_model_is_refused(tmp_path):
    net = build("qwen3_moe")

    class Inner(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            make(POLICIES, 4, 2, 1, str(tmp_path), **STILL, model=net)[0].train()

    outer, _ = make(POLICIES, 4, 2, 2, str(tmp_path), **STILL, model=net, trainer={"callbacks": [Inner()]})
    with pytest.raises(StateError, match="one balancer per model"):
        outer.train()


@pytest.mark.full
def test_a_batch_that_does_not_fit_is_tried_again_with_fewer_rows(tmp_path, want):
    """auto_find_batch_size begins the training anew inside one call of train()."""
    from transformers import Trainer

    class Small(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if len(inputs["input_ids"]) > 4:
                raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer, recorder = make(POLICIES, 5, 2, 2, str(tmp_path), **STILL, kind=Small, auto_find_batch_size=True)
    trainer.train()
    assert trainer._train_batch_size == 4
    check(recorder.result(trainer), want)


class Says(TrainerCallback):
    """Sets an attribute of the Trainer before training begins."""

    def __init__(self, **names: Any) -> None:
        self.names = names
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, value in self.names.items():
            setattr(self.trainer, name, value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"get_cp_size": lambda: 2}, "sequences cut over 2 ranks"),
        ({"get_sp_size": lambda: 4}, "sequences cut over 4 ranks"),
    ],
)
def test_ways_to_run_a_model_that_were_never_compared_are_refused(tmp_path, names, message):
    """B02: what would be divided by other tokens than the routers see is an error, and no weaker loss."""
    trainer, recorder = make(POLICIES, 4, 2, 1, str(tmp_path), **STILL)
    says = Says(**names)
    says.trainer = trainer
    trainer.callback_handler.callbacks.insert(0, says)
    with pytest.raises(ConfigError, match=message):
        trainer.train()
    assert recorder.balance.balancer is None and not set(HOOKED) & set(vars(trainer))


def test_data_parallel_is_refused(tmp_path):
    trainer, _ = make(POLICIES, 4, 2, 1, str(tmp_path), **STILL)
    trainer.args._n_gpu = 2
    with pytest.raises(ConfigError, match="torchrun"):
        trainer.train()


def test_batches_whose_tokens_cannot_be_counted_are_refused(tmp_path):
    """Where it was said that they are counted; else each micro-batch weighs the same."""
    given = {"trainer": {"data_collator": list}, "balance": {"tokens": "counted"}}
    trainer, _ = make(POLICIES, 4, 2, 1, str(tmp_path), **STILL, **given)
    with pytest.raises(StateError, match=r"batches with input_ids .*\n.*list of dict\n.*tokens='micro_batch'"):
        trainer.train()


def test_a_dense_model_is_refused(tmp_path):
    """B19: a balancer that would do nothing says so."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    trainer, _ = make(POLICIES, 4, 2, 1, str(tmp_path), model=dense)
    with pytest.raises(ConfigError, match="a model with MoE layers"):
        trainer.train()


def test_a_callback_without_a_trainer_says_so():
    callback = BalanceCallback([policy(POLICIES[0])])
    with pytest.raises(StateError, match=r"balancer\.tap"):
        callback.on_train_begin(None, None, None, model=model())
    with pytest.raises(StateError, match="before training begins"):
        callback.save("nowhere")


def test_a_model_made_for_each_training(tmp_path):
    """model_init: as in a search for hyperparameters, checkpoints of a trial in its own folder."""
    from transformers import Trainer

    made = []

    class Trials(Trainer):
        def _get_output_dir(self, trial: Any) -> str:
            return f"{self.args.output_dir}/run-7"

    trainer, recorder = make(
        POLICIES, 4, 2, 1, str(tmp_path), **STILL, kind=Trials, save_strategy="steps", save_steps=1,
        trainer={"model_init": lambda: made.append(build("qwen3_moe")) or made[-1]},
    )  # fmt: skip
    trainer.train()
    assert (tmp_path / "run-7" / "checkpoint-1" / "balancer.equipoise").exists()
    assert recorder.balance.balancer._layers[0].router.module in list(made[-1].modules())


def test_attached_to_its_trainer_it_is_the_same_and_reads_no_stack(monkeypatch, tmp_path):
    """Gradients and loads as with ``callbacks=``, twice over; one callback serves one Trainer."""
    trainer, want = make(POLICIES, 4, 2, 2, str(tmp_path / "one"), **STILL)
    trainer.train()
    trainer, got = make(POLICIES, 4, 2, 2, str(tmp_path / "two"), **STILL)
    trainer.remove_callback(got.balance)
    for reader in ("trainers.calls", "hf.calls"):
        monkeypatch.setattr(f"equipoise.adapters.{reader}", lambda *_: pytest.fail("the stack was read"))
    assert got.balance.attach(trainer) is got.balance.attach(trainer)
    for _ in range(2):
        got.gradients.clear()
        got.loads.clear()
        trainer.train()
        assert got.loads == want.loads
        for ours, theirs in zip(got.gradients, want.gradients, strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    other, _ = make(POLICIES, 4, 2, 2, str(tmp_path / "three"), **STILL)
    with pytest.raises(StateError, match="another Trainer"):
        got.balance.attach(other)
