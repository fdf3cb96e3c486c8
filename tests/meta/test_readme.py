"""The README's library example runs as it stands, and its picture is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_library_example_runs(capsys, tmp_path):
    library, trainer = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    names: dict = {}
    exec(compile(library, "README.md", "exec"), names)
    assert 0 <= float(capsys.readouterr().out) <= 15  # MaxVio of 16 experts
    transformers = pytest.importorskip("transformers")
    names |= {
        "Trainer": transformers.Trainer,
        "args": transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]),
        "data": [],
    }
    exec(compile(trainer, "README.md", "exec"), names)
    assert any(isinstance(one, names["BalanceCallback"]) for one in names["trainer"].callback_handler.callbacks)


def test_every_file_it_names_is_there():
    for path in re.findall(r"\]\(((?!https?:)[^)]+)\)", TEXT):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"^  (\w+\.py|\w+/)", TEXT, flags=re.MULTILINE):
        assert (ROOT / "src/equipoise" / name).exists(), name
