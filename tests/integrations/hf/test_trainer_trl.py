"""TRL's SFTTrainer: packed documents, completions only, and its own balance loss, which is on unless told otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

from equipoise import ConfigError
from integrations.hf._trainer import Recorder, arguments_of, as_rank, in_order, quiet
from integrations.hf._trainer_reference import COEF, POLICIES, check, expected, same_gradients
from integrations.hf._trl import words
from integrations.hf.families import build

pytestmark = [
    pytest.mark.xdist_group("ranks"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore:this model's own balance loss"),
]
FAMILY, ROWS = "qwen3_moe", 8
DOCUMENTS = [{"kind": "aux", "scope": "document", "coef": COEF}, POLICIES[1]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return words()


def rows() -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) in ids; lengths 4 to 10 with the end token that TRL adds to the completion."""
    draw = torch.Generator().manual_seed(5)
    out = []
    for i in range(ROWS):
        ids = torch.randint(3, 64, (3 + i % 6,), generator=draw).tolist()
        out.append((ids[: 1 + i % 2], [*ids[1 + i % 2 :], 2]))
    return out


def dataset() -> Any:
    from datasets import Dataset

    def text(ids: list[int]) -> str:
        return " ".join("<eos>" if i == 2 else f"w{i}" for i in ids)

    return Dataset.from_list([{"prompt": text(p), "completion": " " + text(c)} for p, c in rows()])


def padded() -> dict[str, torch.Tensor]:
    """All rows with their padding; labels are the completions."""
    length = max(len(p) + len(c) for p, c in rows())
    found: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, completion in rows():
        filled = [0] * (length - len(prompt) - len(completion))
        found["input_ids"].append(prompt + completion + filled)
        found["attention_mask"].append([1] * (length - len(filled)) + filled)
        found["labels"].append([-100] * len(prompt) + completion + [-100] * len(filled))
    return {key: torch.tensor(value) for key, value in found.items()}


def sft(
    folder: Any, tokenizer: Any, policies: list[dict], *, config: dict | None = None, **arguments: Any
) -> dict[str, Any]:
    """Two epochs of one step each over all rows, weights still."""
    from trl import SFTConfig, SFTTrainer

    quiet()
    recorder = Recorder(policies)
    still = {"learning_rate": 0.0, "optim": "sgd", "num_train_epochs": 2, "shuffle_dataset": False}
    settings = {k: v for k, v in (still | arguments).items() if k != "shuffle_dataset"}
    batch, accumulate = settings.pop("batch"), settings.pop("accumulate")
    args = SFTConfig(**arguments_of(str(folder), batch, accumulate, -1, bf16=False, **settings))
    net = build(FAMILY, **config or {})
    trainer = in_order(SFTTrainer)(
        net, args, train_dataset=dataset(), processing_class=tokenizer, callbacks=recorder.callbacks
    )
    trainer.train()
    return recorder.result(trainer)


@pytest.fixture(scope="module")
def want():
    return expected(FAMILY, batches=[padded()] * 2)


@pytest.mark.parametrize(("batch", "accumulate"), [(8, 1), (2, 4)])
def test_completions_behind_prompts(tmp_path, tokenizer, want, batch, accumulate):
    """B08, B56, B62: T counts the prompt's tokens and not the padding; labels are the completions only."""
    check(sft(tmp_path, tokenizer, POLICIES, batch=batch, accumulate=accumulate), want)


def test_trls_own_loss_is_off(tmp_path, tokenizer, want):
    """B75, B09: TRL adds the model's balance loss itself, on by default; here it would be half of ours again."""
    config = {"router_aux_loss_coef": 0.5, "output_router_logits": True}
    with pytest.warns(UserWarning, match="own balance loss .* is switched off"):
        got = sft(tmp_path, tokenizer, POLICIES, batch=4, accumulate=2, config=config)
    check(got, want)
    assert got["coefficient"] == 0.5, "the user's again"
    assert not any("aux_loss" in entry for entry in got["logs"])


def test_packed_documents_are_balanced_each_for_itself(tmp_path, tokenizer, want):
    """B58: rows of several documents, without padding or mask; the reference has one document a row, padded."""
    packed = {"packing": True, "max_length": 24, "padding_free": True, "completion_only_loss": True}
    check(sft(tmp_path, tokenizer, DOCUMENTS, batch=1, accumulate=3, **packed), want)
    flat = {"padding_free": True, "max_length": None}
    check(sft(tmp_path, tokenizer, DOCUMENTS, batch=4, accumulate=2, **flat), want)


def test_a_packed_row_is_no_sequence(tmp_path, tokenizer):
    """B58: whoever asks for sequences is told that rows are packs."""
    with pytest.warns(UserWarning, match=r"AuxLoss\('document', ...\)"):
        sft(tmp_path, tokenizer, POLICIES, batch=4, accumulate=2, padding_free=True, max_length=None)


def test_padding_that_nothing_names_is_refused(tmp_path, tokenizer):
    """B65: a packed row filled up to a multiple has no mask, so its padding would be routed, counted and balanced."""
    flat = {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16}
    with pytest.raises(ConfigError, match="pad_to_multiple_of"):
        sft(tmp_path, tokenizer, DOCUMENTS, batch=4, accumulate=2, **flat)


def sft_rank(folder: str) -> dict[str, Any]:
    with as_rank():
        return sft(folder, words(), POLICIES, batch=2, accumulate=2)


@pytest.mark.full
def test_two_ranks(ranks, tmp_path, want):
    """B09: TRL, too, multiplies its loss by the number of ranks."""
    call = f"{sft_rank.__module__}:{sft_rank.__name__}"
    for got in ranks.run(call, str(tmp_path), size=2, timeout=120):
        check(got, want)


@pytest.mark.full
def test_preferences(tmp_path, tokenizer):
    """DPO runs the model and a reference over pairs: tokens are those of both answers, and of the model only."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    quiet()
    pairs = Dataset.from_list(
        [{"prompt": f"w{3 + i} w9", "chosen": " w7 w8", "rejected": f" w{10 + i}"} for i in range(8)]
    )
    runs = []
    for batch, accumulate in ((4, 1), (2, 2)):
        recorder = Recorder(POLICIES)
        still = {"learning_rate": 0.0, "optim": "sgd", "bf16": False}
        args = DPOConfig(**arguments_of(str(tmp_path), batch, accumulate, 2, **still))
        trainer = in_order(DPOTrainer)(
            build(FAMILY),
            build(FAMILY),
            args,
            train_dataset=pairs,
            processing_class=tokenizer,
            callbacks=recorder.callbacks,
        )
        trainer.train()
        runs.append(recorder.result(trainer))
    assert runs[0]["steps"] == runs[1]["steps"]
    for one, other in zip(runs[0]["gradients"], runs[1]["gradients"], strict=True):
        same_gradients(one, other, 1e-5)
    (first, _) = [entry for entry in runs[0]["logs"] if "loss" in entry]
    assert sum(runs[0]["steps"][0][0]) == 2 * int(first["balance/tokens"])  # top-2
    assert int(first["balance/tokens"]) == 4 * (2 + 2 + 1) + 4 * (2 + 1 + 1)  # each answer ends with a token of its own


def test_label_smoothing_runs_the_model_twice(tmp_path, tokenizer):
    """B20: the second forward, for metrics only, is without gradient, and counts nothing."""
    got = sft(tmp_path, tokenizer, POLICIES, batch=4, accumulate=2, label_smoothing_factor=0.1)
    check(got, expected(FAMILY, batches=[padded()] * 2, smoothing=0.1))
