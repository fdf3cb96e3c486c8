"""What all tests share: the pool of processes for tests with several ranks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ranks import Pool


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--without-tie",
        action="store_true",
        help="the invariance matrix with the Tie replaced by the identity: passes if every case fails",
    )


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """``ranks.run("package.module:function", *args, size=2)``; see ``ranks.py``."""
    with Pool(4) as pool:
        yield pool


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With --dist loadgroup, all tests with several ranks go to one worker: two pools on two cores would only wait.

    By file, because xdist 3.8 writes a test's group where pytest 9.2 does not read it, and then groups nothing.
    """
    from xdist.scheduler import LoadGroupScheduling

    class OnePool(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ranks" if uses_ranks(config.rootpath / nodeid.partition("::")[0]) else super()._split_scope(nodeid)

    return OnePool(config, log) if config.getvalue("dist") == "loadgroup" else None


@functools.cache
def uses_ranks(file: Path) -> bool:
    text = file.read_text(encoding="utf-8") if file.suffix == ".py" else ""
    return "ranks.run(" in text or 'xdist_group("ranks")' in text
