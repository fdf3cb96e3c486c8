"""The README's library example runs as it stands, and its picture is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_library_example_runs(capsys):
    library, trainer = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    names: dict = {}
    exec(compile(library, "README.md", "exec"), names)
    assert 0 <= float(capsys.readouterr().out) <= 15  # MaxVio of 16 experts
    given = {
        "Trainer": lambda *args, callbacks, **kwargs: callbacks,
        "args": None,
        "data": None,
    }  # tests/integrations/hf has real ones
    names |= given
    exec(compile(trainer, "README.md", "exec"), names)
    assert names["trainer"][0].policies


def test_every_file_it_names_is_there():
    for path in re.findall(r"\]\(((?!https?:)[^)]+)\)", TEXT):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"^  (\w+\.py|\w+/)", TEXT, flags=re.MULTILINE):
        assert (ROOT / "src/equipoise" / name).exists(), name
