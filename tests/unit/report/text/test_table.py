"""The one table of 80 columns: alignment, gaps, headings over several columns, wrapped text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.report.data.formatting import clean, width
from equipoise.report.text.table import COLUMNS, align, rule, table, wrap

names = st.text(st.characters(codec="utf-8"), max_size=12).map(clean)


@given(st.lists(st.tuples(names, names, names), min_size=1, max_size=5), st.integers(0, 3))
def test_columns_end_where_their_widest_cell_ends(rows, gap):
    least = (3, 0, 5)
    wide = [max(least[i], *(width(row[i]) for row in rows)) for i in range(3)]
    for line, row in zip(align(rows, gaps=(gap,), least=least), rows, strict=True):
        cells = [row[0] + " " * (wide[0] - width(row[0]))]
        cells += [" " * (wide[i] - width(row[i])) + row[i] for i in (1, 2)]
        assert line == (" " * gap).join(cells).rstrip()


@pytest.mark.parametrize(("last", "gap"), [(34, 3), (35, 2), (99, 2)])
def test_the_widest_gap_that_fits_is_taken(last, gap):
    (line,) = align([["a" * 20, "b" * 20, "c" * last]])
    assert line == (" " * gap).join(["a" * 20, "b" * 20, "c" * last])


def test_a_table_has_title_rule_header_rows_and_note():
    text = table("Loads", ["expert", "load"], [["0", "12"]], "what it means " * 9)
    title, line, header, row, *note = text.splitlines()
    assert (title, line, header, row) == ("Loads", rule(width(header)), "expert   load", "0          12")
    assert " ".join(note) == ("what it means " * 9).strip()


def test_a_heading_stands_over_its_columns():
    header = ["strategy", "global", "micro", "dead"]
    text = table("", header, [["a", "1", "2", "3"]], spans={"in training": ("global", "micro"), "absent": ("none",)})
    _, _, over, names, _ = text.splitlines()
    start, end = names.index("global"), names.index("micro") + len("micro")
    assert over[start:end].strip("·") == " in training "
    assert over[:start].strip() == "" and len(over) == end


@given(st.text(max_size=400).map(clean))
def test_wrapped_text_fits_and_loses_no_narrow_word(text):
    lines = wrap(text, "  ").split("\n")
    assert all(width(line) <= COLUMNS for line in lines)
    if width(text) == len(text):  # else a line of wide characters is cut
        assert "".join("".join(lines).split()) == "".join(text.split())


def test_a_rule_is_no_wider_than_the_terminal():
    assert (len(rule(12)), len(rule(200))) == (12, COLUMNS)
