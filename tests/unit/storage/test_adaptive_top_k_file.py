"""The file of thresholds: whole, readable by people, and refused where it is another."""

from __future__ import annotations

import json
import math

import pytest

from equipoise import DataError
from equipoise.storage.adaptive_top_k_file import FILE, SavedThreshold, SavedTopK, read_top_k, write_top_k

ROUTERS = {
    "model.layers.0.mlp.gate": SavedThreshold(experts=8, top_k=2, threshold=0.25, sensitivity=3.5),
    "model.layers.1.mlp.gate": SavedThreshold(experts=8, top_k=2, threshold=0.0),
}


def test_what_is_written_is_read(tmp_path):
    saved = SavedTopK(routers=ROUTERS, budget=0.001, measured={"model": "m", "loss": 2.5})
    path = write_top_k(tmp_path, saved)
    assert path == tmp_path / FILE and list(tmp_path.iterdir()) == [path]
    for place in (tmp_path, path):
        found = read_top_k(place)
        assert found.budget == 0.001 and found.measured == saved.measured
        assert found.routers["model.layers.0.mlp.gate"] == ROUTERS["model.layers.0.mlp.gate"]
        assert math.isnan(found.routers["model.layers.1.mlp.gate"].sensitivity)
    other = write_top_k(tmp_path / "new" / "other.json", saved)
    assert read_top_k(other).routers.keys() == ROUTERS.keys()


def test_a_threshold_above_every_weight_stays_one(tmp_path):
    write_top_k(tmp_path, SavedTopK(routers={"a": SavedThreshold(experts=4, top_k=2, threshold=math.inf)}))
    assert read_top_k(tmp_path).routers["a"].threshold == 1e9


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda plain: plain | {"kind": "something"}, "another kind"),
        (lambda plain: plain | {"schema": 2}, "version 2"),
        (lambda plain: plain | {"routers": {"a": {"experts": 4}}}, "top_k"),
        (lambda plain: plain | {"routers": {"a": {"experts": 4, "top_k": 2, "threshold": -1.0}}}, "0 or more"),
        (lambda plain: [plain], "another kind"),
    ],
)
def test_other_files_are_refused(change, says, tmp_path):
    path = write_top_k(tmp_path, SavedTopK(routers=ROUTERS))
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=says):
        read_top_k(path)


def test_no_file_and_half_a_file(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_top_k(tmp_path)
    path = write_top_k(tmp_path, SavedTopK(routers=ROUTERS))
    path.write_text(path.read_text()[:40])
    with pytest.raises(DataError, match="equipoise adapt again"):
        read_top_k(path)
