"""For which runs the spread between seeds is known."""

from __future__ import annotations

from equipoise.report.data.spread import DEFAULT, known_spread


def test_a_spread_is_known_of_exactly_what_was_measured():
    assert known_spread(DEFAULT) is not None
    assert known_spread({}) is None
    for key, other in {"model.width": 128, "train.steps": 800, "data.data": "my.jsonl", "train.lr": 1e-3}.items():
        assert known_spread({**DEFAULT, key: other}) is None
    assert known_spread({key: value for key, value in DEFAULT.items() if key != "train.steps"}) is None


def test_the_run_it_was_measured_on_is_still_the_labs_default():
    from dataclasses import asdict

    from equipoise.lab.config.schema import CompareConfig
    from equipoise.report.data.run_view import flatten

    assert known_spread(flatten(asdict(CompareConfig()))) is not None
