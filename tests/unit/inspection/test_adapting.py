"""What `equipoise adapt` measures on which half of the text, against drops by hand and choices that are said."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from equipoise.adaptive import RecordedChoices, allocate, evaluate, prefetch_hits, stack_distances
from equipoise.adaptive.caches import hits_by_size
from equipoise.adaptive.choices import most_used
from equipoise.adaptive.sweep import ALL
from equipoise.inspection import adapting
from unit.adaptive._models import adaptable, language_model, markov_text


def nothing(*_) -> None:
    pass


def test_halves_share_no_window():
    """Of three domains of 5, 2 and 1 windows, each window of other numbers."""
    counts = [5, 2, 1]

    def read(domain, start, stop):
        return np.arange(4)[None] + 100 * domain + 10 * np.arange(start, stop)[:, None]

    windows = SimpleNamespace(windows=counts, domains=["a", "b", "c"], length=4, read=read)
    first, second = (
        [tuple(row) for batch in half for row in batch.tolist()] for half in adapting._halves(windows, None, 2)
    )
    whole = [tuple(read(d, w, w + 1)[0].tolist()) for d, many in enumerate(counts) for w in range(many)]
    assert sorted(first + second) == sorted(whole)
    assert [sum(row[0] // 100 == d for row in first) for d in range(3)] == [2, 1, 0]


def test_a_layer_alone_is_dropped_alone():
    lm = language_model(layers=3)
    model, held = adaptable(lm), [markov_text(8, 17, seed=4)]
    before = evaluate(model, held)
    found = adapting._alone(model, held, before, nothing)
    for name, layer in zip(model.routers, lm.model.layers, strict=True):
        layer.mlp.gate.drop_below(ALL)
        assert found[name] == pytest.approx(evaluate(model, held).loss - before.loss)
        layer.mlp.gate.drop_below(None)
    assert len({round(one, 6) for one in found.values()}) == 3


def test_caches_and_guesses_are_fitted_on_the_other_half(monkeypatch):
    """Each half uses experts of its own, one layer few and one many: what is fitted on one fits the other ill."""
    draw = np.random.default_rng(0)

    def choices(few: int, many: int, shift: int) -> RecordedChoices:
        used = [np.argsort(draw.random((200, among)), axis=1)[:, :2] for among in (few, many)]
        used_TLK = (np.stack(used, axis=1) + shift) % 8
        return RecordedChoices(used_TLK, np.roll(used_TLK, 1, axis=2)[:, :, :1].repeat(2, axis=2), [8, 8])

    measured, held = choices(3, 8, 0), choices(8, 3, 4)
    model = SimpleNamespace(routers={"a": None, "b": None})
    monkeypatch.setattr(adapting, "record_choices", lambda _model, text, _limits: {0: measured, 1: held}[text[0]])
    rows, ahead = adapting._cached(model, [0], [1], {}, [0.5], nothing)
    hits_LC = hits_by_size(stack_distances(measured.used_TLK, 8), 8)
    want = allocate(hits_LC, 8)
    assert [list(row.sizes) for row in rows if row.fitted] == [list(want)] * 2 != [[4, 4]] * 2
    assert [list(row.sizes) for row in rows if not row.fitted] == [[4, 4]] * 2
    busiest_L, _ = prefetch_hits(held, most_used(measured, 2))
    assert [ahead[name]["most_used"] for name in "ab"] == pytest.approx(busiest_L.tolist(), nan_ok=True)
    assert not np.allclose(busiest_L, prefetch_hits(held, most_used(held, 2))[0], equal_nan=True)
    alone, row = adapting._cached(model, [0], [1], {}, [], nothing)[0], ahead["b"]
    assert alone == [] and row["predicted"] == pytest.approx(prefetch_hits(held)[0][1])
