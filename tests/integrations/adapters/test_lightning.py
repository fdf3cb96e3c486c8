"""BalanceCallback in the real Lightning Trainer: every way to cut a step gives coef · E · f / T."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("lightning", reason="the lightning extra is not installed")
pytest.importorskip("transformers", reason="the hf extra is not installed")

from contracts.law._model import assert_close, aux
from equipoise import ConfigError, DataError, StateError
from integrations.adapters._lightning import STEP, Again, Rows, fit, fit_rank, plain_loop
from integrations.hf._trainer import model as qwen

pytestmark = [
    pytest.mark.xdist_group("ranks"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
POLICIES = [aux("sequence"), aux("global_batch", estimator="previous"), {"kind": "z", "coef": 0.05}]


@pytest.fixture(scope="module")
def expected():
    return {kind: plain_loop(kind, POLICIES, 3) for kind in ("ours", "qwen")}


def check(got: dict[str, Any], want: dict[str, Any]) -> None:
    for tolerance, one, other in zip((1e-5, 1e-4, 1e-3), got["gradients"], want["gradients"], strict=False):
        assert_close(one, other, tolerance)  # weights that AdamW has moved by rounding differ more and more
    assert got["steps"] == want["steps"]
    assert got["loads"] == want["loads"]


@pytest.mark.parametrize("kind", ["ours", "qwen"])
@pytest.mark.parametrize(("batch", "accumulate"), [(8, 1), (4, 2), (2, 4)])
def test_accumulation(expected, kind, batch, accumulate):
    """B07: rows of uneven length; the tokens of a step are known before it begins."""
    got = fit(kind, POLICIES, batch=batch, accumulate=accumulate, steps=3)
    check(got, expected[kind])
    assert got["left"] == [], "the strategy is left as it was"


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_two_ranks(ranks, expected, accumulate):
    """B09: DDP's mean over ranks, in both models."""
    call = f"{fit_rank.__module__}:{fit_rank.__name__}"
    kind = "ours" if accumulate == 2 else "qwen"
    arguments = {"batch": STEP // 2 // accumulate, "accumulate": accumulate, "steps": 3}
    for got in ranks.run(call, kind, POLICIES, arguments, size=2, timeout=120):
        check(got, expected[kind])


def test_a_loader_without_length(expected):
    """Lightning has fetched one batch ahead by itself."""
    check(fit("qwen", POLICIES, batch=2, accumulate=4, steps=3, data=Rows()), expected["qwen"])


def test_the_last_step_of_an_epoch_has_fewer_micro_batches():
    """3 + 2 micro-batches: Lightning divides both losses by 3, so the second weighs 2/3, its balance like its text."""
    got = fit("qwen", POLICIES, batch=2, accumulate=3, steps=2, limit_train_batches=5)
    assert [sum(counts_E) for counts_E in got["loads"]] == [2 * sum(3 + i % 7 for i in range(6, 10))] * 2
    whole = fit("qwen", POLICIES, batch=4, accumulate=1, steps=1, limit_train_batches=1)
    part = fit("qwen", POLICIES, batch=2, accumulate=3, steps=1, limit_train_batches=2)
    assert_close(part["gradients"][0], {n: g * 2 / 3 for n, g in whole["gradients"][0].items()}, 1e-5)


def test_without_tokens_every_micro_batch_weighs_the_same(expected):
    """The means of 2 micro-batches with 18 and 27 tokens: what a loader of unknown batches gets, and nothing better."""
    known = {"tokens": lambda rows: int(rows["attention_mask"].sum())}
    check(fit("ours", POLICIES, batch=4, accumulate=2, steps=1, options=known), plain_loop("ours", POLICIES, 1))
    unknown = fit("ours", POLICIES, batch=4, accumulate=2, steps=1, options={"tokens": lambda _: None})
    with pytest.raises(AssertionError, match="error"):
        check(unknown, expected["ours"] | {"steps": 1, "loads": unknown["loads"]})


def test_mixed_precision_and_clipping():
    """Autocast to bf16 as in a plain loop; then the weights after clipped steps."""
    want = plain_loop("qwen", POLICIES, 2, clip=0.05, dtype=torch.bfloat16)
    got = fit("qwen", POLICIES, batch=4, accumulate=2, steps=2, precision="bf16-mixed", gradient_clip_val=0.05)
    assert_close(got["gradients"][0], want["gradients"][0], 0.02)
    assert_close(got["gradients"][0], want["gradients"][0], 0.02, only="gate")
    full = fit("qwen", POLICIES, batch=4, accumulate=2, steps=2, gradient_clip_val=0.05)
    check(full, plain_loop("qwen", POLICIES, 2, clip=0.05))
    assert_close(full["weights"], plain_loop("qwen", POLICIES, 2, clip=0.05)["weights"], 1e-3)


@pytest.mark.parametrize("scale", [2.0**10, 2.0**127])
def test_gradscaler(scale):
    """fp16's scaler around losses: divided out; a step that it skips because gradients overflow is not counted."""
    from lightning.pytorch.plugins import MixedPrecision

    class Fp16(MixedPrecision):
        """Scales as fp16 does and computes in fp32, to be compared."""

        def autocast_context_manager(self) -> Any:
            return torch.autocast("cpu", enabled=False)

    plugin = Fp16("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-130))
    got = fit("ours", POLICIES, batch=4, accumulate=2, steps=2, plugins=[plugin])
    if scale < 2.0**100:
        check(got, plain_loop("ours", POLICIES, 2))
    else:
        assert got["steps"] == 1
        assert got["logged"][-1]["balance/skipped_steps"] == 1


def test_validation_between_micro_batches_changes_nothing(expected):
    """B26, B28."""
    check(fit("qwen", POLICIES, batch=4, accumulate=2, steps=3, val_check_interval=1), expected["qwen"])


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    """ema and previous loads come back with Lightning's own checkpoint."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    policies = [aux("global_batch", estimator="previous"), aux("global_batch", estimator="ema")]
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    settings: dict[str, Any] = {"batch": 4, "accumulate": 2, "steps": 4, "data": Again()}
    whole = fit("qwen", policies, **settings, callbacks=(saves,), enable_checkpointing=True)
    first = str(tmp_path / "step=2.ckpt")
    again = fit("qwen", policies, **settings, resume=first)
    assert again["steps"] == whole["steps"] == 4
    for one, other in zip(again["gradients"], whole["gradients"][2:], strict=True):
        assert_close(one, other, 1e-5)
    assert again["loads"] == whole["loads"]
    state = torch.load(first, weights_only=True)
    del state["callbacks"]["BalanceCallback"]
    torch.save(state, first)
    with pytest.raises(DataError, match="saved with BalanceCallback"):
        fit("qwen", policies, **settings, resume=first)


def test_manual_optimization():
    """The loop is the user's, and so is the tap; without it nothing would be balanced (B75), which is an error."""
    check(
        fit("ours", [POLICIES[0]], batch=8, accumulate=1, steps=3, manual="tapped"),
        plain_loop("ours", [POLICIES[0]], 3),
    )
    with pytest.raises(StateError, match=r"balancer\.tap"):
        fit("ours", POLICIES, batch=8, accumulate=1, steps=1, manual="untapped")


def test_metrics_are_logged_and_can_be_monitored():
    got = fit("qwen", POLICIES, batch=4, accumulate=2, steps=2, package="pytorch_lightning")
    tokens = [sum(3 + i % 7 for i in range(STEP * step, STEP * (step + 1))) for step in range(2)]
    assert [logged.get("balance/tokens") for logged in got["logged"]] == [None, tokens[0], tokens[0], tokens[1]]
    assert got["logged"][-1]["balance/policy_0/loss"] > 0.9


def test_two_models_have_to_be_named():
    from lightning.pytorch import LightningModule

    from equipoise.adapters.lightning import _balanced

    class Both(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = qwen(), qwen()

    both = Both()
    with pytest.raises(ConfigError, match="student, teacher"):
        _balanced(both, None)
    assert _balanced(both, "student") is both.student
    both.teacher.requires_grad_(False)
    assert _balanced(both, None) is both.student, "what is not trained is not balanced"
