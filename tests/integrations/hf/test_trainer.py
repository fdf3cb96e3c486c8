"""The real Trainer's settings, one by one: whatever it divides its loss by, the balance gradient is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the hf extra is not installed")
pytest.importorskip("accelerate", reason="the hf extra is not installed")

from equipoise import AuxLoss, ConfigError, InputError
from equipoise.adapters.hf import BalanceCallback
from integrations.hf import _trainer_reference as reference
from integrations.hf._trainer import LENGTH, Text, train, train_rank
from integrations.hf._trainer_reference import POLICIES, check, expected, policies_for

pytestmark = [
    pytest.mark.xdist_group("ranks"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
FAMILY = "qwen3_moe"
STILL: dict[str, Any] = {"family": FAMILY, "learning_rate": 0.0, "optim": "sgd"}
PAIRS = [[0, 1], [2, 3], [4, 5], [6, 7]]  # the rows of each micro-batch of 2


@pytest.fixture(scope="module")
def whole():
    """All label tokens of the step weigh the same."""
    return expected(FAMILY)


def on_two_ranks(ranks: Any, batch: int = 2, accumulate: int = 2, **arguments: Any) -> list[dict[str, Any]]:
    call = f"{train_rank.__module__}:{train_rank.__name__}"
    return ranks.run(call, POLICIES, batch, accumulate, 2, STILL | arguments, size=2, timeout=120)


def test_each_rank_weighs_its_own_label_tokens(ranks):
    """B09: without average_tokens_across_devices the language model's loss is another, the balance loss is not."""
    want = expected(FAMILY, means=[[0, 1, 4, 5], [2, 3, 6, 7]])  # micro-batches go to the ranks in turn
    for got in on_two_ranks(ranks, average_tokens_across_devices=False):
        check(got, want)


@pytest.mark.parametrize("asked", [{"scope": "global_batch", "estimator": "exact"}, {"scope": "shuffle"}])
def test_what_needs_a_pass_before_the_step_is_refused_before_training(asked):
    """It died at the second micro-batch, after training had begun. With one micro-batch a step it trains."""
    policies = [{"kind": "aux", "coef": 0.1, **asked}]
    with pytest.raises(ConfigError, match=r"(?s)no counting pass.*gradient_accumulation_steps=1, not 2"):
        train(policies, 2, 2, 1, **STILL)
    assert train(policies, 4, 1, 1, **STILL)


def test_names_stand_for_policies():
    assert BalanceCallback(["global@1e-3"]).policies == [AuxLoss("global_batch", coef=1e-3)]
    with pytest.raises(ConfigError, match="did you mean 'global'"):
        BalanceCallback("globl")


def no_loss_arguments(model: Any) -> None:
    """As a model whose forward takes no num_items_in_batch: the Trainer divides by the micro-batches itself."""
    model.accepts_loss_kwargs = False


def test_a_model_whose_loss_is_a_mean_per_micro_batch(ranks):
    """B10: here the Trainer divides by accumulation steps, in the other mode by tokens."""
    want = expected(FAMILY, means=PAIRS)
    check(train(POLICIES, 2, 4, 2, **STILL, prepare=no_loss_arguments), want)
    for got in on_two_ranks(ranks, prepare=no_loss_arguments):
        check(got, want)


def token_sum(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    """A loss function of the user's."""
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    summed = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    return summed / num_items_in_batch


def test_a_loss_function_of_the_users(ranks, whole):
    """B75: it replaces the model's loss, and with it the one that a coefficient would have gone to."""
    given = {"trainer": {"compute_loss_func": token_sum}}
    check(train(POLICIES, 2, 4, 2, **STILL, **given), whole)
    for got in on_two_ranks(ranks, **given):
        check(got, whole)


def test_label_smoothing():
    """B75: the label smoother drops the model's loss as well."""
    check(train(POLICIES, 4, 2, 2, **STILL, label_smoothing_factor=0.1), expected(FAMILY, smoothing=0.1))


def own_mean(scaled: bool) -> type:
    """A Trainer with a compute_loss of its own, called with positional arguments by its own training step."""
    from transformers import Trainer

    class Own(Trainer):
        loss_is_scaled_for_ga = scaled

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels = inputs.pop("labels")
            loss = token_sum(model(**inputs), labels, (labels[:, 1:] != -100).sum())
            loss = loss / self.current_gradient_accumulation_steps if scaled else loss
            return (loss, {}) if return_outputs else loss

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            normal = self.compute_loss
            self.compute_loss = lambda model, inputs, num_items_in_batch: normal(
                model, inputs, False, num_items_in_batch
            )
            try:
                return super().training_step(model, inputs, num_items_in_batch)
            finally:
                self.compute_loss = normal

    return Own


@pytest.mark.parametrize("scaled", [True, False])
def test_a_trainer_that_says_whether_its_loss_is_scaled(scaled):
    check(train(POLICIES, 2, 4, 2, **STILL, kind=own_mean(scaled)), expected(FAMILY, means=PAIRS))


class Unlabelled(Text):
    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(i)
        return row | {"targets": row.pop("labels")}


def without_labels() -> type:
    """A Trainer whose batches have no labels to count: it divides by the micro-batches then."""
    from transformers import Trainer

    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            targets = inputs.pop("targets")
            return token_sum(model(**inputs), targets, (targets[:, 1:] != -100).sum())

    return Own


def test_batches_without_labels():
    """B10: the same model and Trainer, and another scale: only num_items_in_batch tells."""
    given = {"kind": without_labels(), "trainer": {"train_dataset": Unlabelled()}, "remove_unused_columns": False}
    check(train(POLICIES, 2, 4, 2, **STILL, **given), expected(FAMILY, means=PAIRS))


def test_the_last_step_of_an_epoch_has_fewer_micro_batches():
    """8 micro-batches in steps of 3, 3 and 2: B07, B60 with a number of them that changes."""
    got = train(POLICIES, 4, 3, -1, **STILL, num_train_epochs=1)
    check(got, expected(FAMILY, (12, 12, 8)))


@pytest.mark.parametrize("family", ["deepseek_v3", pytest.param("qwen3_moe", marks=pytest.mark.full)])
def test_compiled_by_the_trainer(family):
    given = STILL | {"family": family, "torch_compile": True, "torch_compile_backend": "aot_eager"}
    torch.compiler.reset()
    check(train(policies_for(family), 4, 2, 2, **given), expected(family))


@pytest.mark.full
def test_compiled_by_inductor_and_recomputed():
    given = {"torch_compile": True, "torch_compile_backend": "inductor", "gradient_checkpointing": True}
    torch.compiler.reset()
    check(train(POLICIES, 4, 2, 2, **STILL, **given), expected(FAMILY))


def generating() -> Any:
    """After each step some text, with a cache and padding on the left."""
    from transformers import TrainerCallback

    class Generate(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            net = kwargs["model"].eval()
            ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
            net.generate(
                input_ids=ids, attention_mask=(ids > 0).long(), max_new_tokens=3, do_sample=False, use_cache=True
            )

    return Generate()


def test_evaluation_between_steps_changes_nothing(whole):
    """B25, B26, B27; B64: nor does generation, where the mask is longer than the tokens of a call."""
    given = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "trainer": {"callbacks": [generating()]}}
    got = train(POLICIES, 4, 2, 2, **STILL, **given)
    check(got, whole)
    assert any("eval_loss" in entry for entry in got["logs"])


class FourDimensions(Text):
    """A mask that says who sees whom: nothing in it tells what is padding."""

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return super().__getitem__(i) | {"attention_mask": torch.ones(1, LENGTH, LENGTH, dtype=torch.bool).tril()}


def test_a_mask_of_four_dimensions():
    """B63: it crashes the model's own loss; here it is not taken for a batch without padding."""
    with pytest.raises(InputError, match=r"who sees whom(.|\n)*attention_mask \(B, S\)"):
        train(POLICIES, 2, 4, 2, **STILL, trainer={"train_dataset": FourDimensions()})


def test_the_models_own_loss_is_off_and_logs_show_ours(whole):
    """B75, B17, B18: whatever the configuration says, nothing is balanced twice or not at all, and it is seen."""
    check(train(POLICIES, 4, 2, 2, **STILL, config={"router_aux_loss_coef": 0.0}), whole)
    got = train(POLICIES, 4, 2, 2, **STILL, config={"output_router_logits": True, "router_aux_loss_coef": 0.1})
    check(got, whole)
    assert got["coefficient"] == 0.1, "the user's again"
    tokens = [int(reference.rows_of(8 * step, 8)["attention_mask"].sum()) for step in range(2)]
    assert [entry["balance/tokens"] for entry in got["logs"] if "loss" in entry] == tokens
    assert got["own"] == [], "the Trainer is left as it was"


@pytest.mark.full
def test_weights_that_move(whole):
    """Two real steps of AdamW: every cut ends at the same weights."""
    moving = STILL | {"learning_rate": 1e-3, "optim": "adamw_torch"}
    one, other = (train(POLICIES, batch, accumulate, 2, **moving) for batch, accumulate in ((8, 1), (1, 8)))
    for name, weight in one["weights"].items():
        assert torch.allclose(weight, other["weights"][name], rtol=0, atol=1e-4), name  # a step is 1e-3
    assert one["loads"] == other["loads"]


def test_tensorboard_gets_the_metrics(tmp_path):
    """Names are those of Balancer.metrics(), behind the Trainer's own prefix."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(POLICIES, 4, 2, 2, str(tmp_path), **STILL, report_to="tensorboard")
    (file,) = tmp_path.rglob("events.out.tfevents*")
    found = EventAccumulator(str(file))
    found.Reload()
    scalars = found.Tags()["scalars"]
    assert {"train/balance/maxvio_global", "train/balance/policy_0/loss", "train/balance/tokens"} <= set(scalars)
    assert len(found.Scalars("train/balance/maxvio_global")) == 2
