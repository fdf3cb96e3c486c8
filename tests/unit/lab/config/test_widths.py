"""Widths of unlike experts from ratios: they sum to the equal ones, as near the ratios as whole numbers are."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import ConfigError
from equipoise.evidence.run_summary import LATER, run_key
from equipoise.lab.config.schema import ModelConfig, RunConfig
from equipoise.lab.config.widths import SHAPES, expert_widths


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(50, 200))
@settings(deadline=None)
def test_they_sum_to_the_equal_ones_and_keep_the_ratios(ratios, hidden):
    widths = expert_widths(":".join(map(str, ratios)), len(ratios), hidden)
    assert widths is not None
    total = hidden * len(ratios)
    assert sum(widths) == total
    assert all(abs(width - total * ratio / sum(ratios)) < 1 for width, ratio in zip(widths, ratios, strict=True))


def test_names_are_the_paper_s_shapes():
    assert expert_widths("arithmetic", 8, 64) == expert_widths("9:11:13:15:17:19:21:23", 8, 64)
    assert (
        expert_widths("hybrid", 8, 64) == expert_widths("1:1:1:1:2:2:4:4", 8, 64) == (32,) * 4 + (64,) * 2 + (128,) * 2
    )
    assert expert_widths("geometric", 4, 15) == (4, 8, 16, 32)
    assert expert_widths("", 8, 64) is None
    for shape in SHAPES:
        for experts in (1, 2, 3, 5, 16):
            widths = expert_widths(shape, experts, 4096)
            assert widths is not None and list(widths) == sorted(widths)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1:2", "a ratio for each of model.experts = 3"),
        ("1:0:2", "ratios above 0"),
        ("1:-1:2", "ratios above 0"),
        ("1,2,3", "for example 9:11"),
        ("aritmetic", "arithmetic, geometric, hybrid"),
        ("1:1:9999", "leave a width"),
    ],
)
def test_what_does_not_fit_is_refused_when_the_model_is_configured(text, words):
    with pytest.raises(ConfigError, match=words):
        ModelConfig(experts=3, expert_hidden=8, expert_widths=text)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_p": 1.5, "normalize_weights": False}, "model.top_p of at most 1"),
        ({"top_p": -0.5, "normalize_weights": False}, "model.top_p of 0 or more"),
        ({"top_p": 0.6}, "normalize_weights=false"),
    ],
)
def test_so_is_a_probability_outside(settings, words):
    with pytest.raises(ConfigError, match=words):
        ModelConfig(**settings)


def test_runs_on_record_keep_their_names():
    assert {f"model.{name}" for name in ("expert_widths", "top_p")} <= LATER.keys()
    assert all(
        getattr(ModelConfig(), name.removeprefix("model.")) == off for name, off in LATER.items() if "model." in name
    )
    plain = run_key(RunConfig())
    assert run_key(RunConfig(model=ModelConfig(expert_widths="arithmetic"))) != plain
    assert run_key(RunConfig(model=ModelConfig(top_p=0.6, normalize_weights=False))) != plain
