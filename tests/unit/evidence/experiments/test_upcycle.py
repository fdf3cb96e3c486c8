"""The experiment ``upcycle``, tiny: a trained dense model, its cases, equally many tokens in each."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean
from types import SimpleNamespace

import pytest

from equipoise.errors import ConfigError
from equipoise.evidence.experiment import trial_of
from equipoise.evidence.experiments.upcycle import EXPERIMENT, MEASURES, Settings, _numbers, dense_model, run
from equipoise.lab.upcycling import Upcycled
from equipoise.lab.upcycling.held_out import held_out_loss
from equipoise.lab.upcycling.result import LayerResult
from unit.lab.conftest import _one_thread, _own_cache, corpus_file  # noqa: F401

TINY = Settings(
    sequence_length=32, vocab_size=300, layers=1, width=16, heads=1, head_dim=16, hidden=32, dense_steps=6, sequences=4,
    experts=4, granularity=4, tokens=1024, distill_tokens=128, passes=2, distill_batch=2, warmup=1, eval_sequences=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(corpus_file):  # noqa: F811
    return replace(TINY, data=str(corpus_file))


def test_all_cases_of_a_seed_begin_with_one_dense_model_and_read_as_much(tiny, tmp_path):
    found = {case: run(case, tiny, 3, tmp_path / case) for case in ("fine split", "distill micro")}
    assert {one.tokens for one in found.values()} == {1024}
    assert found["fine split"].numbers["dense_loss"] == found["distill micro"].numbers["dense_loss"]
    for one in found.values():
        assert one.numbers.keys() == MEASURES.keys() and len(one.loss) == 3
        assert one.numbers["active"] < 1.0
        assert fmean(one.loss.values()) < one.numbers["loss_start"]  # it was trained on
    assert math.isnan(found["fine split"].numbers["error"])
    distilled = found["distill micro"].numbers
    assert 0 < distilled["error"] < 1 and distilled["distilled_maxvio"] >= 0 and distilled["distilled_topk_score"] <= 1
    again = run(
        "distill micro", tiny, 3, tmp_path / "distill micro"
    )  # stopped after its training: nothing is done twice
    assert again == found["distill micro"]


def test_each_number_is_read_from_its_place():
    layers = [
        LayerResult(layer=n, moe=True, seconds=9.0, error_before=0.9, error=0.1 + 0.2 * n, maxvio=0.3 + n,
                    topk_score=0.5 + n, information=0.05 + n, shares=[0.75, 1.0], top_k=2)
        for n in (0, 1)
    ]  # fmt: skip
    made = Upcycled(
        method="distill", architecture="", experts=8, top_k=2, granularity=4, noise=0.0, strategy="global",
        dense_parameters=1_000, parameters=2_500, active_parameters=750, dense_loss={"a": 1.0, "b": 2.0},
        loss={"a": 3.0, "b": 5.0}, tokens=0, seconds=0.0, layers=layers, notes=[],
    )  # fmt: skip
    end = SimpleNamespace(maxvio_global=[0.25, 0.75], mutual_information=[0.125, 0.375])
    assert _numbers(made, end) == pytest.approx({
        "loss_start": 4.0, "dense_loss": 1.5, "active": 0.75, "error": 0.2, "distilled_maxvio": 0.8,
        "distilled_topk_score": 1.0, "distilled_information": 0.55, "maxvio": 0.5, "information": 0.25,
    })  # fmt: skip


def test_the_dense_model_is_trained_and_kept(tiny):
    from equipoise.lab.data.packing import prepare
    from equipoise.lab.models.pretrained import load_network

    folder = dense_model(tiny, 0)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert dense_model(replace(tiny, tokens=4096, experts=8), 0) == folder  # of what it is not made of
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    others = [dense_model(tiny, 1), dense_model(replace(tiny, dense_steps=1), 0)]
    data = prepare(tiny.data, vocab_size=300, sequence_length=32)
    trained, _, hardly = (fmean(held_out_loss(load_network(str(one)), data, 4).values()) for one in (folder, *others))
    assert trained < hardly - 0.05


@pytest.mark.parametrize(
    ("case", "settings", "said"),
    [
        ("splt", {}, "did you mean 'split'"),
        ("distill globl", {}, "did you mean 'global'"),
        ("distill loss-free", {}, "a strategy of losses"),
        ("copy", {"experts": 1}, "lower top_k"),
        ("distill global", {"tokens": 400_000}, "raise tokens"),
    ],
)
def test_cases_that_cannot_run(case, settings, said):
    with pytest.raises(ConfigError, match=said):
        trial_of("upcycle", case, settings, 0)


def test_text_is_named_by_its_digest(tiny, corpus_file):  # noqa: F811
    from equipoise.lab.data.packing import prepare

    digest = prepare(corpus_file, vocab_size=300, sequence_length=32).corpus_sha256
    assert EXPERIMENT.corpus(tiny, lambda text, share: None) == digest[:12]
