"""The browser of all tests that look at a page: one a process, since Playwright runs no second one beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def browser() -> Iterator:
    from unit.report._browser import CHROMIUM, WITHOUT, launched

    pytest.importorskip("playwright", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip(WITHOUT)
    with launched() as found:
        yield found
