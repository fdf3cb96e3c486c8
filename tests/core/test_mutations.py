"""The planted mistakes still fit the source; ``python tests/mutations.py`` shows that each is caught."""

from __future__ import annotations

import pytest

from mutations import MUTATIONS, ROOT


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mistake_can_still_be_planted(name):
    mutation = MUTATIONS[name]
    assert (ROOT / "src" / "equipoise" / mutation.file).read_text().count(mutation.before) == 1
    file, _, selection = mutation.tests.partition(" ")
    assert selection
    assert (ROOT / "tests" / "core" / file).is_file()
