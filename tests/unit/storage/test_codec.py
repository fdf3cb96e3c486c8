"""The codec: what was encoded is decoded, every mismatch names its field, and nothing is changed without a rule."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import pytest

from equipoise.storage.codec import (
    FieldError,
    MissingField,
    Rules,
    UnknownField,
    convert,
    decode,
    encode,
    without_nan,
)


@dataclass(frozen=True)
class Inner:
    rate: float = 1.0


@dataclass(frozen=True)
class Outer:
    count: int
    inner: Inner = field(default_factory=Inner)
    names: tuple[str, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)
    loads: list[list[int]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    many: list[Inner] = field(default_factory=list)
    note: str | None = None
    free: dict[str, Any] = field(default_factory=dict)


FULL = Outer(3, Inner(0.5), ("a", "b"), (1.0, 2.0), [[1, 2], []], {"x": 0.25}, [Inner(2.0)], "n", {"k": [None, 1]})


def test_what_is_encoded_is_decoded():
    assert decode(Outer, json.loads(json.dumps(encode(FULL))), Rules()) == FULL
    assert decode(Outer, {"count": 1}, Rules()) == Outer(1)


@pytest.mark.parametrize(
    ("data", "path", "expected"),
    [
        ({"count": 1.5}, "count", "a whole number"),
        ({"count": True}, "count", "a whole number"),
        ({"count": 1, "inner": {"rate": "fast"}}, "inner.rate", "a number"),
        ({"count": 1, "inner": 3}, "inner", "a table"),
        ({"count": 1, "names": "a,b"}, "names", "a list of strings"),
        ({"count": 1, "names": [1]}, "names[0]", "a string"),
        ({"count": 1, "pair": [1.0]}, "pair", "a list of 2 numbers"),
        ({"count": 1, "loads": [[1], [2.5]]}, "loads[1][0]", "a whole number"),
        ({"count": 1, "metrics": {"x": "y"}}, "metrics.x", "a number"),
        ({"count": 1, "metrics": {"x": None}}, "metrics.x", "a number"),
        ({"count": 1, "many": [{}, {"rate": []}]}, "many[1].rate", "a number"),
        ({"count": 1, "note": 3}, "note", "a string"),
    ],
)
def test_a_mismatch_names_its_field(data, path, expected):
    with pytest.raises(FieldError) as caught:
        decode(Outer, data, Rules())
    assert (caught.value.path, caught.value.expected) == (path, expected)


def test_missing_and_unknown_fields_are_kinds_of_their_own():
    with pytest.raises(MissingField, match="count"):
        decode(Outer, {}, Rules())
    with pytest.raises(UnknownField) as caught:
        decode(Outer, {"count": 1, "inner": {"rats": 1}}, Rules(), "run")
    assert (caught.value.path, caught.value.cls, caught.value.table) == ("run.inner.rats", Inner, "run.inner")
    assert decode(Outer, {"count": 1, "later": 2}, Rules(unknown_fields=True)) == Outer(1)
    with pytest.raises(FieldError, match="a table"):
        decode(Outer, ["count"], Rules())  # type: ignore[arg-type]


def test_rules_allow_one_thing_each():
    assert convert(int, 3.0, "x", Rules(whole_floats=True)) == 3
    with pytest.raises(FieldError, match="a whole number"):
        convert(int, 3.0, "x", Rules())
    with pytest.raises(FieldError):
        convert(int, math.inf, "x", Rules(whole_floats=True))
    assert convert(tuple[str, ...], "a, b,", "x", Rules(comma_lists=True)) == ("a", "b")
    assert math.isnan(convert(list[float], [1.0, None], "x", Rules(null_is_nan=True))[1])
    with pytest.raises(FieldError):
        convert(list[int], [None], "x", Rules(null_is_nan=True))
    for value in (math.nan, math.inf):
        with pytest.raises(FieldError, match="a finite number"):
            convert(list[float], [value], "x", Rules(finite=True))


def test_not_finite_becomes_null_at_any_depth():
    data = {1: [math.nan, (math.inf, 2)], "b": {"c": -math.inf}, "d": "nan"}
    assert without_nan(data) == {"1": [None, [None, 2]], "b": {"c": None}, "d": "nan"}
