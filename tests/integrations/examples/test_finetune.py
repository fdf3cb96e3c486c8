"""The end-to-end example: pretrained by the lab, exported, fine-tuned by transformers with and without us, reported."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from equipoise.storage.run_record import read_run
from integrations.examples._fresh import run

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "finetune_two_domains.py"
WORDS = {"low": "a b c d e f g h", "digits": "0 1 2 3 4 5 6 7 8 9", "signs": "+ - * / = ( ) [ ] ;"}
TINY = {
    "model.layers": 2, "model.width": 16, "model.heads": 2, "model.head_dim": 8, "model.experts": 8,
    "model.expert_hidden": 8, "model.vocab_size": 300, "data.sequence_length": 32, "train.warmup": 2,
    "train.eval_every": 0, "train.micro_batches": 4, "train.tensorboard": "false",
}  # fmt: skip


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """(what it printed, where it wrote)."""
    for package in ("accelerate", "transformers"):
        pytest.importorskip(package, reason="the example fine-tunes with transformers: the hf extra is not installed")
    root = tmp_path_factory.mktemp("example")
    draw = random.Random(0)
    with open(root / "text.jsonl", "w", encoding="utf-8") as file:
        for number in range(80):
            for domain, words in WORDS.items():
                text = f"{' '.join(draw.choices(words.split(), k=150))} {number}"
                file.write(json.dumps({"text": text, "domain": domain}) + "\n")
    settings = [f"--set={name}={value}" for name, value in TINY.items()]
    settings += ["--data=text.jsonl", "--domains=low,digits", "--steps=4", "--pretrain-steps=4", "--out=out"]
    out, errors = run(EXAMPLE, *settings, cwd=root, EQUIPOISE_CACHE=str(root / "cache"))
    assert "switched off" not in errors.partition("own balance loss")[0]
    return out, root / "out"


def test_both_ways_are_measured_on_the_same_text(shown):
    out, folder = shown
    own, ours = (read_run(folder / name) for name in ("own-loss", "global-batch"))
    for one in (own, ours):
        assert one.status == "finished" and not one.problems
        assert [step.step for step in one.steps] == [1, 2, 3, 4]
        assert [said.step for said in one.evaluations] == [1, 2, 3, 4]
        assert set(one.evaluations[-1].loss) == {"low", "digits"}
        assert one.evaluations[-1].mean_loss < one.evaluations[0].mean_loss
    assert ours.steps[0].balance["balance/maxvio_global"] > 0 and not own.steps[0].balance
    # the same batch and weights: the first losses agree but for the balance loss that the model adds to its own
    assert own.steps[0].loss == pytest.approx(ours.steps[0].loss, abs=0.05)
    assert own.steps[0].loss > ours.steps[0].loss
    assert own.evaluations[-1].loss != ours.evaluations[-1].loss
    assert "global batch" in out and "Held-out text after 4 steps" in out and "the fine-tuned model says:" in out
    assert (folder / "report.html").read_text(encoding="utf-8").lower().startswith("<!doctype html")


def test_what_was_fine_tuned_is_a_model_again(shown):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(shown[1] / "global-batch" / "model")
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
