"""The small corpus of the lab's tests, and their cache."""

from __future__ import annotations

from unit.lab.conftest import _one_thread, _own_cache, corpus_file  # noqa: F401
