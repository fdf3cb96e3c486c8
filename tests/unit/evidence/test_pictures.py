"""Small pictures: what is drawn lies where its number says, and inside the frame."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from equipoise.evidence.claim import Contrast
from equipoise.evidence.pictures import curves_picture, domains_picture, extent, interval_picture
from equipoise.evidence.verdict import Judged
from equipoise.report.data.curves import Curve
from equipoise.report.data.statistics import paired_difference
from equipoise.report.html.pictures import round_up
from equipoise.report.html.rendering import environment

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SOME = st.lists(st.floats(-5, 5), min_size=1, max_size=9)


def svg_of(picture) -> ElementTree.Element:
    drawn = environment("equipoise.evidence").get_template("picture.html.jinja").module.picture(picture)
    return ElementTree.fromstring(drawn.strip())


def difference_of(values):
    return paired_difference(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0))


def points(svg: ElementTree.Element, kind: str) -> list[tuple[int, int]]:
    """Where the path of this class goes, of lines drawn with M, H, V and h0."""
    data = "".join(one.get("d", "") for one in svg.iter("path") if kind in one.get("class", "").split())
    found, at = [], (0, 0)
    for letter, text in re.findall(r"([MHVhzv])([^MHVhzv]*)", data):
        values = [int(value) for value in text.split()]
        if letter == "M":
            found += [at := pair for pair in zip(values[::2], values[1::2], strict=True)]
        elif letter == "H":
            found.append(at := (values[0], at[1]))
    return found


@quick
@given(SOME, st.none() | st.floats(0.001, 2), st.floats(-1, 1))
def test_an_interval_lies_where_its_numbers_say(values, margin, around):
    contrast = Contrast(cell="c", treated="a", baseline="b", criterion="equal", margin=1.0, around=around)
    difference = difference_of(values)
    assert difference is not None
    judged = Judged(contrast, {}, difference, margin, 0.5, "undecided")
    reach = round_up(extent(difference, around, margin))
    svg = svg_of(interval_picture(judged, reach))
    ends = sorted(float(one.text.replace("−", "-")) for one in svg.iter("text"))
    assert ends == pytest.approx([-reach, 0, reach], rel=1e-5)

    def where(value: float) -> float:
        return 170 + value / reach * 154

    ((x, _),) = points(svg, "mean")
    assert x == pytest.approx(where(difference.mean), abs=0.51)
    assert [x for x, _ in points(svg, "seeds")] == pytest.approx([where(value) for value in values], abs=0.51)
    line = [x for x, _ in points(svg, "interval")]
    known = [where(end) for end in (difference.low, difference.high) if end is not None]
    assert line == pytest.approx(known, abs=0.51)
    boxes = [(float(one.get("x")), float(one.get("width"))) for one in svg.iter("rect")]
    assert len(boxes) == (margin is not None)
    for left, width in boxes:
        assert left == pytest.approx(where(around - margin), abs=0.51)
        assert left + width == pytest.approx(where(around + margin), abs=0.51)
    drawn = [x for x, _ in points(svg, "seeds") + points(svg, "interval")] + [end for box in boxes for end in box]
    assert all(0 <= one <= 340 for one in drawn)


@quick
@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0, 1)), min_size=1, max_size=9), st.booleans())
def test_curves_stay_in_their_frame_and_in_their_order(rows, zero):
    steps = list(range(10, 10 * len(rows) + 1, 10))
    mean = [value for value, _ in rows]
    curve = Curve(steps, mean, [value - half for value, half in rows], [value + half for value, half in rows])
    svg = svg_of(curves_picture([("treated", curve), ("baseline", None)], "said", zero=zero))
    line, band = points(svg, "line"), points(svg, "band")
    assert len(line) == len(rows) and len(band) == 2 * len(rows)
    assert all(88 <= x <= 504 and 16 <= y <= 236 for x, y in line + band)
    assert [x for x, _ in line] == sorted(x for x, _ in line)
    by_value = sorted(zip(mean, (y for _, y in line), strict=True))
    assert [y for _, y in by_value] == sorted((y for _, y in by_value), reverse=True)  # higher values lie higher
    assert len(points(svg, "zero")) == 2 * zero
    assert svg.get("aria-label") == "said"


def test_nothing_to_draw_is_no_picture():
    contrast = Contrast(cell="c", treated="a", baseline="b")
    assert curves_picture([("treated", None)], "said") is domains_picture({}) is None
    assert interval_picture(Judged(contrast, {}, None, None, 0.5, "not run"), 1.0) is None
    one = svg_of(curves_picture([("treated", Curve([0], [3.0]))], "said"))
    assert len(points(one, "dots")) == 1  # a line through one point would not be seen


def test_every_domain_has_its_row():
    domains = {f"domain {n}": difference_of([0.01 * n, -0.02]) for n in range(5)}
    domains["a name that is far too long & <wild>"] = difference_of([0.3])
    svg = svg_of(domains_picture(domains))
    means = points(svg, "mean")
    reach = max(float(one.text.replace("−", "-")) for one in svg.iter("text") if one.get("class") is None)
    assert [x for x, _ in means] == pytest.approx([310 + one.mean / reach * 102 for one in domains.values()], abs=0.51)
    assert len({y for _, y in means}) == 6 and len(points(svg, "interval")) == 2 * 5  # the last has one pair only
    assert "−0.010" in [one.text for one in svg.iter("text")]
    assert all(len(one.text) <= 16 for one in svg.iter("text"))


@quick
@given(st.floats(1e-9, 1e9))
def test_the_end_of_an_axis_is_near_and_round(value):
    for steps in ((1, 2, 5, 10), (1, 1.5, 2, 3, 4, 5, 6, 8, 10)):
        found = round_up(value, steps)
        assert value <= found <= 2.6 * value
        assert float(f"{found:.2g}") == found
