"""The cache folder follows the environment, and two processes do not build the same thing."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from equipoise.errors import OutputError
from equipoise.storage.cache import cache_folder, one_builder


def test_the_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("EQUIPOISE_CACHE", "/own/place")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/own/place")
    monkeypatch.delenv("EQUIPOISE_CACHE")
    assert cache_folder() == Path("/xdg/equipoise")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "equipoise"


def test_a_second_builder_waits_for_the_first(tmp_path):
    target, order = tmp_path / "packed" / "one", []

    def second() -> None:
        with one_builder(target):
            order.append("second")

    thread = threading.Thread(target=second)
    with one_builder(target):
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]


def test_a_cache_that_cannot_be_written_says_how_to_choose_another(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="EQUIPOISE_CACHE"), one_builder(tmp_path / "file" / "packed" / "one"):
        pass
