"""The example of upcycling: a dense model trained, three folders of experts, and what each kept."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from integrations.examples._fresh import run

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "upcycle_dense.py"
WORDS = {"low": "a b c d e f g h", "digits": "0 1 2 3 4 5 6 7 8 9"}


def test_three_ways_side_by_side(tmp_path):
    pytest.importorskip("transformers", reason="the example loads what it made by transformers: no hf extra here")
    draw = random.Random(0)
    with open(tmp_path / "text.jsonl", "w", encoding="utf-8") as file:
        for number in range(80):
            for domain, words in WORDS.items():
                text = f"{' '.join(draw.choices(words.split(), k=600))} {number}"
                file.write(json.dumps({"text": text, "domain": domain}) + "\n")
    arguments = ["--data=text.jsonl", "--steps=4", "--tokens=4096", "--eval-sequences=1", "--out=out"]
    said, _ = run(EXAMPLE, *arguments, cwd=tmp_path, EQUIPOISE_CACHE=str(tmp_path / "cache"))
    found = {name: json.loads((tmp_path / "out" / name / "upcycle.json").read_text())
             for name in ("copy", "split", "distill")}  # fmt: skip
    assert {one["architecture"] for one in found.values()} == {"Qwen3MoeForCausalLM"}
    active = [
        found[name]["active_parameters"] / found[name]["dense_parameters"] for name in ("copy", "split", "distill")
    ]
    assert active[0] > active[1] > 1.0 > active[2]  # the router's rows are what a split has more
    rows = re.findall(r"^(copy|split|distill) +(\d\.\d{4}) +([+-]\d\.\d{4})", said, flags=re.MULTILINE)
    assert [name for name, *_ in rows] == ["copy", "split", "distill"]
    assert abs(float(rows[0][2])) < 0.01 and abs(float(rows[1][2])) < 0.01
