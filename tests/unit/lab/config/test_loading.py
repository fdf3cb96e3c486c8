"""``--set``: values are TOML where they can be, strings where they cannot, and never lost."""

from __future__ import annotations

import pytest

from equipoise.errors import ConfigError
from equipoise.lab.config.loading import keys, merge, parse_set
from equipoise.lab.config.schema import RunConfig


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("1e-3", 1e-3), ("true", True), ("bf16", "bf16"), ('"a b"', "a b"), ("[1, 2]", [1, 2]), ("a,b", "a,b"),
     ("", ""), ("a=b", "a=b"), ("1\nw = 2", "1\nw = 2")],
)  # fmt: skip
def test_a_value_is_toml_or_a_string(text, value):
    assert parse_set([f"a.b={text}"]) == {"a.b": value}


@pytest.mark.parametrize("item", ["train.lr", "=3", " = 3"])
def test_what_is_no_assignment_is_refused(item):
    with pytest.raises(ConfigError, match="name=value"):
        parse_set([item])


def test_the_last_of_two_wins():
    assert parse_set(["a=1", "a=2"]) == {"a": 2}


def test_merging_leaves_its_input_alone():
    data = {"train": {"lr": 1.0}}
    assert merge(data, {"train.lr": 2.0, "model.width": 3}) == {"train": {"lr": 2.0}, "model": {"width": 3}}
    assert data == {"train": {"lr": 1.0}}


def test_a_setting_inside_a_value_is_refused():
    with pytest.raises(ConfigError, match="strategy is a value"):
        merge({"strategy": "micro"}, {"strategy.name": "global"})


def test_all_settings_of_a_run_are_known_by_dotted_name():
    known = set(keys(RunConfig))
    assert {"train", "train.lr", "model.experts", "data.data", "strategy"} <= known
