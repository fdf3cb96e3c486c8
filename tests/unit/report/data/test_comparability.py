"""What two runs must agree on, and the last step that runs share."""

from __future__ import annotations

from pathlib import Path

import pytest

from equipoise.report.data.comparability import common_step, compare_settings, settings_key
from equipoise.storage.run_record import End, Run
from unit.report.synthetic import header


def run(strategy="micro", seed=0, *, finished=True, **changes) -> Run:
    config = changes.pop("config", {})
    head = header(strategy, seed, **changes)
    for name, value in config.items():
        table, _, key = name.partition(".")
        head.config[table][key] = value
    return Run(Path("run"), head, end=End(1, "finished", 1.0, 1, 0, "") if finished else None)


def test_seeds_and_strategies_share_their_key_and_other_settings_do_not():
    assert settings_key(run(seed=0)) == settings_key(run("global", 1, config={"train.load_every": 3}))
    for other in ({"config": {"train.lr": 1.0}}, {"corpus_sha256": "ab" * 32}, {"layers": 4}, {"domains": ["python"]}):
        assert settings_key(run()) != settings_key(run(**other))


@pytest.mark.parametrize(
    ("other", "same_text", "differs", "says"),
    [
        ({}, True, [], None),
        ({"config": {"train.lr": 1.0}}, True, ["train.lr"], "differ in more than the strategy: train.lr (0.003 | 1.0)"),
        ({"corpus_sha256": "ab" * 32}, False, [], "not evaluated on the same text: corpus"),
        ({"config": {"model.gate": "sigmoid"}}, True, [], "bring their own router"),
        ({"seed": 3}, True, [], "same seeds (micro 0; global 3)"),
        ({"versions": {"equipoise": "9"}}, True, [], "different versions of equipoise: 0.1.0, 9"),
    ],
)
def test_every_difference_is_a_warning(other, same_text, differs, says):
    warnings, found_same, found = compare_settings({"micro": [run()], "global": [run("global", **other)]})
    assert (found_same, found) == (same_text, differs)
    assert [says in " ".join(warnings)] == [True] if says else warnings == []


@pytest.mark.parametrize(
    ("runs", "evaluated", "step", "warned"),
    [
        ([], [], None, ""),
        ([True], [[]], None, "No run has been evaluated"),
        ([True, True], [[5, 10], [5, 10]], 10, ""),
        ([True, True], [[5, 10, 15], [5, 10]], 10, "different lengths"),
        ([True, False], [[5, 10], [5]], 10, ""),  # the one that still runs does not hold the others back
        ([False, False], [[5, 10], [5]], 5, "different lengths"),
        ([True, True], [[5], [6]], None, "share no step"),
    ],
)
def test_the_last_shared_step(runs, evaluated, step, warned):
    found, warnings = common_step([run(finished=one) for one in runs], evaluated)
    assert found == step
    assert warned in " ".join(warnings) and bool(warned) == bool(warnings)
