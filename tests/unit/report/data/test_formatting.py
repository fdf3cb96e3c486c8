"""How numbers and names are written: widths, cuts and escapes that hold for any text."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from equipoise.report.data.formatting import clean, clip, number, percent, signed, width


@pytest.mark.parametrize("keep_end", [True, False])
@given(text=st.text(), columns=st.integers(1, 40))
@example(text="中文", columns=2)  # one wide character is wider than what is left beside the ellipsis
def test_clip_is_never_too_wide_and_keeps_what_fits(keep_end, text, columns):
    text = clean(text)
    found = clip(text, columns, keep_end=keep_end)
    assert width(found) <= columns
    if width(text) <= columns:
        assert found == text
    elif keep_end:
        head, _, tail = found.rpartition("…")
        assert text.startswith(head) and text.endswith(tail)
    else:
        assert found.endswith("…") and text.startswith(found[:-1])
        cut = text[len(found) - 1]
        assert width(found) + width(cut) > columns  # not one character fewer than fits


@given(st.text())
def test_clean_text_drives_no_terminal(text):
    found = clean(text)
    assert not {unicodedata.category(char) for char in found} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert clean(found) == found


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 4))
def test_a_number_is_the_number_to_its_places(value, places):
    assert float(number(value, places).replace(",", "")) == float(f"{value:.{places}f}")


@pytest.mark.parametrize("value", [None, float("nan")])
def test_what_is_missing_is_a_dash(value):
    assert number(value) == signed(value) == percent(value) == "–"
