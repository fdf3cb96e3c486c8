"""Inspections in the terminal: means over layers beside what chance gives, 80 columns, no name that drives it."""

from __future__ import annotations

import math
from dataclasses import replace

from equipoise.report.data.formatting import width
from equipoise.report.data.inspections import name_inspections
from equipoise.report.text.inspections import render_inspections
from unit.report.synthetic_inspection import synthetic_inspection


def test_a_line_per_measure_holds_the_mean_and_chance(inspections):
    text = render_inspections(name_inspections(inspections))
    for label, value, chance in (
        ("MaxVio, all text", lambda one: one.maxvio_global, lambda one: one.noise_global),
        ("Entropy of the mean gate, nats", lambda one: one.entropy_mean, lambda one: math.log(one.num_experts)),
    ):
        (line,) = [line for line in text.splitlines() if line.startswith(label)]
        shown = [
            f"{sum(map(read, one.layers)) / len(one.layers):.2f}" for one in inspections for read in (value, chance)
        ]
        assert line.split(label)[1].replace("(", "").replace(")", "").split() == shown
    dead = [str(sum(len(layer.dead) for layer in one.layers)) for one in inspections]
    (line,) = [line for line in text.splitlines() if line.startswith("Dead experts")]
    assert line.split()[2:] == dead


def test_many_inspections_with_hostile_names_fit(inspections):
    one = replace(inspections[0], problems=["x\x1b[2J: left out " * 9])
    facts = [replace(one.facts, model=f"models/{i}中\x1b[31m" + "long" * 20) for i in range(7)]
    text = render_inspections(name_inspections([replace(one, facts=each) for each in facts]))
    assert max(map(width, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert text.count("Mean over layers") == 3  # tables, for seven columns


def test_one_domain_has_no_information():
    text = render_inspections(name_inspections([synthetic_inspection(names=["only"])]))
    (line,) = [line for line in text.splitlines() if line.startswith("Domain information")]
    assert line.split() == ["Domain", "information,", "nats", "–"]
