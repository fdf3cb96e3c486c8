"""The small corpus of the lab's tests and their cache, and the browser of the report's."""

from __future__ import annotations

from unit.lab.conftest import _one_thread, _own_cache, corpus_file  # noqa: F401
from unit.report.conftest import browser  # noqa: F401
