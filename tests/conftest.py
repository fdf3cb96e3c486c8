"""What all tests share: the pool of processes for tests with several ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ranks import Pool


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--without-tie",
        action="store_true",
        help="the matrix of tests/invariance with the Tie replaced by the identity: passes if every case fails",
    )


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """``ranks.run("package.module:function", *args, size=2)``; see ``ranks.py``."""
    with Pool(4) as pool:
        yield pool


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One of xdist's workers owns the pool (with --dist loadgroup): two pools on two cores would only wait."""
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("ranks"))
