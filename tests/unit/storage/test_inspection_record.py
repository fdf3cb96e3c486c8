"""An inspection's files come back as written; what is missing, damaged or newer says so."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest

from equipoise.errors import DataError
from equipoise.storage.inspection_record import (
    ARRAYS_NAME,
    INSPECTION_NAME,
    Arrays,
    is_inspection,
    read_inspection,
    write_inspection,
)
from unit.report.synthetic_inspection import synthetic_inspection


@pytest.mark.parametrize("more", [{}, {"names": ["only"]}, {"against": True, "layers": 2, "experts": 8}])
def test_what_is_written_is_read(tmp_path, more):
    made = synthetic_inspection(**more)
    write_inspection(tmp_path, made)
    found = read_inspection(tmp_path)
    assert is_inspection(tmp_path)
    for one in fields(Arrays):
        np.testing.assert_array_equal(getattr(found.arrays, one.name), getattr(made.arrays, one.name))
    assert (found.facts, found.domains, found.layers) == (made.facts, made.domains, made.layers)
    assert found.strings == made.strings


def test_a_page_gets_what_it_shows(tmp_path):
    made = synthetic_inspection(domains=4, layers=2, experts=8, top_k=2)
    counts = made.arrays.counts_DLE
    frequency, high, shared = made.frequency_DLE(), made.high_DLE(), made.shared_LDD()
    exclusive, lift = made.exclusive_DLE(), made.lift_LEE()
    for l in range(2):
        for d in range(4):
            for e in range(8):
                assert frequency[d, l, e] == pytest.approx(2 * counts[d, l, e] / counts[d, l].sum())
                assert high[d, l, e] == (frequency[d, l, e] >= 2 * 2 / 8)
                assert exclusive[d, l, e] == (high[d, l, e] and sum(high[o, l, e] for o in range(4)) == 1)
            for other in range(4):
                assert shared[l, d, other] == sum(high[d, l, e] and high[other, l, e] for e in range(8))
        pairs, load = made.arrays.coactivation_LEE[l], np.diagonal(made.arrays.coactivation_LEE[l])
        total = sum(load[i] * load[j] for i in range(8) for j in range(8) if i != j)
        met = sum(pairs[i, j] for i in range(8) for j in range(8) if i != j)
        i, j = 1, 2
        assert lift[l, i, j] == pytest.approx(pairs[i, j] / (load[i] * load[j] * met / total))
        assert np.isnan(lift[l, 3, 3])


def damage_nothing_there(folder):
    (folder / INSPECTION_NAME).unlink()


def damage_stopped(folder):
    (folder / INSPECTION_NAME).unlink()
    (folder / "state").mkdir()


def damage_cut(folder):
    content = (folder / ARRAYS_NAME).read_bytes()
    (folder / ARRAYS_NAME).write_bytes(content[:-10])


def damage_cut_json(folder):
    content = (folder / INSPECTION_NAME).read_bytes()
    (folder / INSPECTION_NAME).write_bytes(content[: len(content) // 2])


def edit(change):
    def damage(folder):
        head = json.loads((folder / INSPECTION_NAME).read_text(encoding="utf-8"))
        change(head)
        (folder / INSPECTION_NAME).write_text(json.dumps(head), encoding="utf-8")

    return damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_nothing_there, "no inspection.json"),
        (damage_stopped, "goes on with it"),
        (damage_cut, "checksum"),
        (damage_cut_json, "JSONDecodeError"),
        (edit(lambda head: head.update(schema=99)), "newer"),
        (edit(lambda head: head.update(kind="a recipe")), "another kind"),
        (edit(lambda head: head["layers"][0].update(top_k="two")), "top_k"),
        (edit(lambda head: head["layers"][0].pop("gate")), "gate"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path, damage, says):
    write_inspection(tmp_path, synthetic_inspection(domains=2, layers=1, experts=8))
    damage(tmp_path)
    with pytest.raises(DataError, match=says):
        read_inspection(tmp_path)


def test_a_later_version_may_say_more(tmp_path):
    write_inspection(tmp_path, synthetic_inspection())
    edit(lambda head: head["facts"].update(mood="good"))(tmp_path)
    assert read_inspection(tmp_path).facts.seed == 0
