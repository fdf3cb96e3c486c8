"""The README's library example runs as it stands, and its picture is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_library_example_and_the_trainer_s_line_run(capsys, tmp_path):
    (library,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    names: dict = {}
    exec(compile(library, "README.md", "exec"), names)
    assert 0 <= float(capsys.readouterr().out) <= 15  # MaxVio of 16 experts
    transformers = pytest.importorskip("transformers")
    callbacks = importlib.import_module("equipoise.adapters.hf")
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = transformers.Trainer(names["model"], args, train_dataset=[])
    (line,) = re.findall(r"`(equipoise\.adapters\.hf\..*attach\(trainer\))`", TEXT)
    exec(line, names | {"trainer": trainer, "equipoise": importlib.import_module("equipoise")})
    assert any(isinstance(one, callbacks.BalanceCallback) for one in trainer.callback_handler.callbacks)


def test_every_file_it_names_is_there():
    for path in re.findall(r"\]\(((?!https?:)[^)]+)\)", TEXT):
        assert (ROOT / path.partition("#")[0]).exists(), path
    for name in re.findall(r"^  (\w+\.py|\w+/)", TEXT, flags=re.MULTILINE):
        assert (ROOT / "src/equipoise" / name).exists(), name
