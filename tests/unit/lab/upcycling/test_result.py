"""The numbers of an upcycling as a file, and as tables of at most 80 columns."""

from __future__ import annotations

import math

import pytest

from equipoise.errors import DataError
from equipoise.lab.upcycling.result import LayerResult, Upcycled, read_result, render_result, write_result


def made(**more) -> Upcycled:
    facts = {
        "method": "copy", "architecture": "Qwen3MoeForCausalLM", "experts": 8, "top_k": 2, "granularity": 1,
        "noise": 0.01, "strategy": "", "dense_parameters": 1_000, "parameters": 2_500, "active_parameters": 1_250,
        "dense_loss": {}, "loss": {}, "tokens": 0, "seconds": 3.2, "layers": [], "notes": [],
    }  # fmt: skip
    return Upcycled(**facts | more)


def test_it_comes_back(tmp_path):
    layers = [LayerResult(layer=0, moe=True, seconds=1.5, error=0.25, shares=[0.75, 1.0], top_k=2),
              LayerResult(layer=1, moe=False, seconds=0.5)]  # fmt: skip
    found = made(layers=layers, loss={"a": 2.0}, dense_loss={"a": 1.5}, notes=["so"])
    write_result(tmp_path / "upcycle.json", found)
    back = read_result(tmp_path / "upcycle.json")
    assert back.layers[0].error == 0.25 and math.isnan(back.layers[0].maxvio) and math.isnan(back.layers[1].error)
    assert back.loss == found.loss and back.notes == ["so"] and back.layers[0].shares == [0.75, 1.0]
    (tmp_path / "upcycle.json").write_text("{")
    with pytest.raises(DataError, match="into a new folder"):
        read_result(tmp_path / "upcycle.json")


def test_what_it_cost_and_kept():
    text = render_result(made(dense_loss={"a": 1.5, "b": 2.5}, loss={"a": 1.75, "b": 2.5}, notes=["a word " * 20]))
    rows = [line.split() for line in text.splitlines()]
    assert ["parameters", "1,000", "2,500", "2.50", "x"] in rows and ["1.25", "x"] in [row[-2:] for row in rows]
    assert ["2.0000", "2.1250", "+0.1250"] in [row[-3:] for row in rows]
    assert ["a", "1.5000", "1.7500", "+0.2500"] in rows and ["b", "2.5000", "2.5000", "+0.0000"] in rows
    assert "copies" in text and "note: a word" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_without_text_no_loss_is_said():
    text = render_result(made(method="split"))
    assert "loss" not in text and "split" in text


def test_each_distilled_layer():
    layers = [LayerResult(layer=n, moe=True, seconds=2.0, error_before=0.5, error=0.125, maxvio=0.3, topk_score=0.4,
                          information=0.1, shares=[0.75, 1.0], top_k=2) for n in range(12)]  # fmt: skip
    text = render_result(made(method="distill", strategy="global", layers=layers, tokens=100_000))
    assert text.count("50.0%") == 12 and "12.5%" in text and "100,000 tokens" in text and "balance global" in text
    assert all(len(line) <= 80 for line in text.splitlines())
