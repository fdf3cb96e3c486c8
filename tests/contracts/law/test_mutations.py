"""The planted mistakes still fit the source; ``python tests/mutations.py`` shows that each is caught."""

from __future__ import annotations

import re
import shutil

import pytest

from mutations import MUTATIONS, ROOT, plant


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mistake_can_still_be_planted(name, tmp_path):
    mutation = MUTATIONS[name]
    copy = tmp_path / "equipoise" / mutation.file
    copy.parent.mkdir(parents=True)
    shutil.copy(ROOT / "src" / "equipoise" / mutation.file, copy)
    plant(mutation, tmp_path)
    compile(copy.read_text(encoding="utf-8"), mutation.file, "exec")
    file, _, selection = mutation.tests.partition(" ")
    text = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert re.search(rf"def test_\w*{selection.split()[0]}", text), (
        f"no test of {file} is called {selection.split()[0]}"
    )


def test_the_mistakes_of_the_plan_are_there():
    said = " ".join(MUTATIONS)
    for words in (
        *("twice under recompute", "1/dp", "1/M", "divided by K", "pooled", "padding", "bf16", "every micro-batch"),
        *("evaluation", "identity", "shards", "not waited for", "other stages"),
    ):
        assert words in said
