"""The summary in a terminal: what it says first, how wide it is, and that names cannot steer the terminal."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from equipoise.inspection import summarize_inspection
from unit.report.synthetic_inspection import synthetic_inspection


def flat(text):
    return re.sub(r"\s+", " ", text)


@pytest.mark.parametrize("more", [{}, {"domains": 12, "layers": 48, "experts": 128, "top_k": 8}, {"against": True}])
def test_eighty_columns_with_every_layer(more):
    found = synthetic_inspection(**more)
    text = summarize_inspection(found)
    assert max(map(len, text.splitlines())) <= 80
    assert sum(re.match(r"\d+ +\d", line) is not None for line in text.splitlines()) == len(found.layers)
    dead = sum(len(layer.dead) for layer in found.layers)
    experts = sum(layer.num_experts for layer in found.layers)
    assert f"Experts: {dead} of {experts} dead" in flat(text)
    assert ("models/early: 70% of choices are the same" in flat(text)) == bool(more.get("against"))


def test_what_specializes_comes_first():
    found = synthetic_inspection(sharpness=1.2, seed=3)
    text = flat(summarize_inspection(found))
    most = max(range(3), key=lambda i: found.layers[i].information_corrected)
    assert f"most in layer {most}: {found.layers[most].information_corrected:.3f}" in text
    assert text.index("Domains:") < text.index("Balance:") < text.index("Experts:")
    worst = max(range(3), key=lambda i: found.layers[i].maxvio_global)
    assert f"the busiest expert of layer {worst}" in text
    for domain, count in zip(found.domains, found.exclusive_DLE().sum((1, 2)), strict=True):
        assert f"{domain.name} {count}" in text
    assert "Alike by weights: 3 pairs, such as 0 and 1 of layer 0 (0.97)" in text


def test_names_cannot_steer_the_terminal():
    found = synthetic_inspection(names=["a\x1b[31mred", "b\u202ecba"], model="m\x1b]0;title\x07")
    text = summarize_inspection(replace(found, problems=["x\x1b[2J: left out"]))
    assert "\x1b" not in text and "\u202e" not in text and "\x07" not in text


def test_one_domain_has_no_information():
    text = summarize_inspection(synthetic_inspection(names=["only"]))
    assert "Domains:" not in text and "Balance:" in text
