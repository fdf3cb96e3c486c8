"""The text and the page of adaptive top-k: what is said is what was found, in 80 columns and without links."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

from equipoise.report.html.adaptive_page import curve_picture, render_adaptive_page
from equipoise.report.html.rendering import environment
from equipoise.report.text.adaptive import render_adaptive
from equipoise.storage.adaptive_record import AdaptedLayer, Adaptive, AdaptiveFacts, CacheRow, CurvePoint


def found(
    *, name: str = "model.layers.{}.mlp.gate", layers: int = 3, saved: int = 2, measured: bool = True
) -> Adaptive:
    facts = AdaptiveFacts(model="m", family="qwen3_moe", data="d", targets="model", measured_tokens=1000,
                          held_tokens=900, sequence_length=64, device="cpu", dtype="float32", created="now",
                          seconds=1.0)  # fmt: skip
    curve = [CurvePoint(budget=10.0 ** (i - 5), fewer=0.1 * i, loss=2 + 0.01 * i**2, control_weight=0.1 * i,
                        control_fewer=0.1 * i, control_loss=2 + 0.02 * i**2) for i in range(6)]  # fmt: skip
    rows = [AdaptedLayer(name=name.format(i), experts=8, top_k=2, sensitivity=2.0**-i, alone=0.1 / (i + 1),
                         alone_measured=0.2 / (i + 1) if measured else math.nan, threshold=0.1 * i, used=1.5,
                         predicted=math.nan if not i else 0.9, most_used=0.3) for i in range(3)]  # fmt: skip
    caches = [CacheRow(kept=0.5, adaptive=a, fitted=f, sizes=[4, 3 + f, 5 - f], hits=0.7, loads=0.4, waits=0.1)
              for a in (False, True) for f in (False, True)]  # fmt: skip
    return Adaptive(facts=facts, layers=rows, curve=curve, knee=2, saved=curve[saved], caches=caches)


def test_the_text_says_what_was_found():
    said = render_adaptive(found())
    assert max(map(len, said.splitlines())) <= 80
    words = " ".join(said.split())
    assert "20.0% fewer" in words and "+0.0400 nats (2.0000 before)" in words and "+0.0800 at 20.0% fewer" in words
    assert "predicted and measured 1.00" in words
    assert re.search(r"^0\.001 +20\.0% +2\.0400 +\+0\.0400 +20\.0% +\+0\.0800 +knee$", said, flags=re.MULTILINE)
    assert re.search(r"^1 +0\.5 +\+0\.0500 +\+0\.1000 +0\.100 +1\.50 of 2 +90% \(30%\)$", said, flags=re.MULTILINE)
    assert re.search(r"^50% +adaptive +fitted +4 +70\.0% +0\.400 +0\.100$", said, flags=re.MULTILINE)


def test_long_and_hostile_names_stay_inside():
    one = found(name="a\x1b[31m" + "b" * 60 + ".{}.<script>x</script>", measured=False)
    said = render_adaptive(one)
    assert "\x1b" not in said and max(map(len, said.splitlines())) <= 80
    page = render_adaptive_page(one)
    assert "<script" not in page and "\x1b" not in page


def test_the_page_draws_both_curves_and_loads_nothing():
    one = found(saved=3)
    page = render_adaptive_page(one)
    assert page == render_adaptive_page(one)
    assert not re.search(r"(src|href)=\"(?!#)", page) and "Content-Security-Policy" in page
    template = environment().get_template("picture.html.jinja").module
    svg = ElementTree.fromstring(template.picture(curve_picture(one)).strip())
    lines = {path.get("class"): path.get("d") for path in svg.iter("path")}
    points = {
        kind: [tuple(map(int, pair.split())) for pair in re.findall(r"-?\d+ -?\d+", lines[f"line {kind}"] or "")]
        for kind in ("treated", "baseline")
    }
    assert all(len(line) == 6 for line in points.values())
    for kind, line in points.items():
        xs, ys = zip(*line, strict=True)
        assert list(xs) == sorted(xs) and list(ys) == sorted(ys, reverse=True), kind
    assert all(a[1] >= b[1] for a, b in zip(points["treated"], points["baseline"], strict=True)), "higher is lower down"
    saved = tuple(map(int, re.findall(r"-?\d+", lines["mean"] or "")[:2]))
    assert saved == points["treated"][3]
