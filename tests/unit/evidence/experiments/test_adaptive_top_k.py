"""The experiment behind A01: a small training measured in three ways, and what cannot be measured."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest

from equipoise.errors import ConfigError
from equipoise.evidence.experiments import adaptive_top_k
from equipoise.evidence.experiments.adaptive_top_k import EXPERIMENT, Settings

SMALL = {"layers": 2, "width": 32, "experts": 4, "expert_hidden": 16, "vocab_size": 300, "sequence_length": 32,
         "steps": 3, "micro_batches": 4, "warmup": 1, "windows": 2, "draws": 3}  # fmt: skip


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    draw, path = random.Random(0), tmp_path / "text.jsonl"
    rows = [
        {"text": " ".join(draw.choices(words.split(), k=150)), "domain": domain}
        for _ in range(40)
        for domain, words in (("low", "a b c d e f g h"), ("digits", "0 1 2 3 4 5 6 7 8 9"))
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_a_trial_from_training_to_numbers(text, tmp_path):
    settings = Settings(**SMALL, data=text)
    folder = tmp_path / "trial"
    found = EXPERIMENT.run("global", settings, 1, folder)
    assert found.numbers.keys() == EXPERIMENT.measures.keys()
    assert found.numbers["all experts"] == 0
    for way in ("by sensitivity", "by one threshold"):
        assert found.numbers[f"fewer {way}"] == pytest.approx(0.25, abs=0.01)
    assert -1 <= found.numbers["order"] <= 1
    assert set(found.loss) == {"low", "digits"} and found.tokens == 3 * 4 * 32
    again = EXPERIMENT.run("global", settings, 1, folder)
    assert again == found, "a finished training is measured again to the same numbers"


def test_each_number_is_the_loss_of_its_way_less_that_of_all_experts(monkeypatch):
    """Of losses that are said, not measured: three layers that cost 0.1, 0.3 and 0.2 with one expert a token."""

    def held(loss, share):
        return SimpleNamespace(loss=loss, fewer=lambda _model: share)

    cost = {"a": 0.1, "b": 0.3, "c": 0.2}
    said = {
        "measure_sensitivity": lambda *_, **__: SimpleNamespace(alone={"a": 1.0, "b": 3.0, "c": 2.0}),
        "_batches": lambda *_: [],
        "evaluate": lambda *_: held(2.0, 0.0),
        "evaluate_at": lambda *_, sensitive=True: held(2.1, 0.25) if sensitive else held(2.4, 0.26),
        "_loss": lambda _model, _held, limits: 2.0 + sum(cost[name] for name, on in limits.items() if on),
        "random_layers": lambda names, _share, seed: {name: float(name == names[seed % 3]) for name in names},
    }
    for name, value in said.items():
        monkeypatch.setattr(adaptive_top_k, name, value)
    model = SimpleNamespace(routers=dict.fromkeys(cost))
    assert adaptive_top_k._measured(model, None, Settings(draws=3), 0) == pytest.approx({
        "all experts": 0, "by sensitivity": 0.1, "by one threshold": 0.4, "in random layers": 0.2, "one expert": 0.6,
        "order": 1.0, "fewer by sensitivity": 0.25, "fewer by one threshold": 0.26,
    })  # fmt: skip


@pytest.mark.parametrize("wrong", [{"top_k": 1}, {"fewer": 0.6}, {"fewer": 0.0}, {"windows": 0}])
def test_what_cannot_run(wrong):
    with pytest.raises(ConfigError):
        EXPERIMENT.check("global", Settings(**SMALL | wrong))
    with pytest.raises(ConfigError):
        EXPERIMENT.check("no strategy", Settings(**SMALL))
