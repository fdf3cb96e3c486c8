"""The headline says what was found, no more: cases made to order."""

from __future__ import annotations

from dataclasses import replace

import pytest

from equipoise.records import RecordWriter, read_run
from equipoise.report import summarize
from report.synthetic import KINDS, Kind, header, write_run

MICRO = KINDS["micro"]


def headline(tmp_path, kinds: dict[str, Kind], *, seeds: int = 1, shift=None) -> str:
    """Trains nothing: writes runs of these kinds, their losses moved by ``shift(strategy, seed)``."""
    runs = []
    for name, kind in kinds.items():
        for seed in range(seeds):
            source = read_run(write_run(tmp_path / "draft" / f"{name}{seed}", header(name, seed, steps=50), kind))
            folder = tmp_path / f"{name}{seed}"
            folder.mkdir()
            evaluation = source.evaluations[-1]
            wanted = kind.loss + (shift(name, seed) if shift else 0.0)
            loss = dict.fromkeys(evaluation.loss, wanted)
            with RecordWriter(folder) as writer:
                for record in (source.header, *source.steps, replace(evaluation, loss=loss), source.end):
                    assert record is not None
                    writer.write(record)
            runs.append(read_run(folder))
    return summarize(runs).headline


def test_a_large_effect_with_one_seed(tmp_path):
    text = headline(tmp_path, {"micro": MICRO, "global": replace(KINDS["global"], loss=MICRO.loss - 0.0872)})
    assert text.startswith("global reaches perplexity 35.1 where micro has 38.3 (-8.4%, one seed); the experts of")
    assert "x better" in text


def test_a_small_effect_with_one_seed_is_no_effect(tmp_path):
    text = headline(tmp_path, {"micro": MICRO, "global": replace(MICRO, loss=MICRO.loss - 0.02)})
    assert text.startswith("No clear difference in perplexity: global has 37.5, micro 38.3 (-2.0%, one seed, seeds ")
    assert "better" not in text.split(";")[0]


def test_three_seeds_that_agree(tmp_path):
    kinds = {"micro": MICRO, "global": replace(KINDS["global"], loss=MICRO.loss - 0.08)}
    text = headline(tmp_path, kinds, seeds=3, shift=lambda name, seed: 0.01 * seed - 0.002 * (name > "m" and seed == 1))
    assert text.startswith("global reaches perplexity")
    assert "(-7.6%, 95% interval -7.9% to -7.4%, 3 seeds)" in text


def test_two_seeds_that_agree_but_prove_little(tmp_path):
    kinds = {"micro": MICRO, "global": replace(KINDS["global"], loss=MICRO.loss - 0.08)}
    text = headline(tmp_path, kinds, seeds=2, shift=lambda name, seed: -0.04 * seed * (name == "global"))
    assert "every seed agrees, yet too few for certainty: 95% interval" in text
    assert "2 seeds" in text


def test_seeds_that_disagree(tmp_path):
    kinds = {"micro": MICRO, "global": replace(KINDS["global"], loss=MICRO.loss - 0.08)}
    text = headline(tmp_path, kinds, seeds=2, shift=lambda name, seed: 0.12 * seed * (name == "global"))
    assert text.startswith("No clear difference in perplexity")


def test_the_baseline_may_win(tmp_path):
    worse = {name: replace(MICRO, loss=MICRO.loss + more) for name, more in (("global", 0.2), ("none", 0.1))}
    text = headline(tmp_path, {"micro": MICRO, **worse})
    assert text.startswith("No strategy beats micro at perplexity 38.3: none comes nearest with 42.3 (+10.5%, one ")


def test_one_strategy_is_not_compared(tmp_path):
    assert headline(tmp_path, {"global": MICRO}) == "global reaches perplexity 38.3 on held-out text after 50 steps."


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [(0.0, 0.6, "the experts of global tell domains apart"), (0.6, 0.0, "do not tell domains apart"),
     (0.0, 0.0, "the experts of neither tell domains apart"), (0.6, 0.6, "as well as those of micro"),
     (0.3, 0.6, "x better"), (0.6, 0.3, "x less well")],
)  # fmt: skip
def test_what_the_experts_know_is_told_against_chance(tmp_path, before, after, says):
    kinds = {"micro": replace(MICRO, sharpness=before, maxvio=0.0),
             "global": replace(MICRO, sharpness=after, maxvio=0.0, loss=MICRO.loss - 0.1)}  # fmt: skip
    text = headline(tmp_path, kinds)
    assert says in text.split(";")[1]
