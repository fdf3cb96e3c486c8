"""Which folder a comparison works in: the one named, a stopped one of the same settings, or a new one."""

from __future__ import annotations

import pytest
from rich.console import Console

from equipoise.errors import DataError
from equipoise.lab.comparison import launch
from equipoise.lab.comparison.comparison import Comparison, plan
from equipoise.lab.config.schema import CompareConfig

CONFIG = CompareConfig(strategies=("micro",), seeds=1)


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """The folder of a comparison that was stopped, under ``runs/`` of the working folder."""
    monkeypatch.chdir(tmp_path)
    folder = launch.ROOT / "compare-20260131-120000"
    folder.mkdir(parents=True)
    Comparison(folder, CONFIG, plan(CONFIG, folder), "2026-01-31").save()
    return folder


def chosen(config=CONFIG, out=None, resume=None, new=False):
    return launch._folder(config, out, resume, new, Console(stderr=True))


def test_a_stopped_comparison_is_continued_unless_told_otherwise(stopped, tmp_path, capsys):
    assert chosen() == stopped
    assert "going on with" in capsys.readouterr().err
    other = chosen(new=True)
    assert other.parent == launch.ROOT
    assert other != stopped
    assert chosen(CompareConfig(strategies=("global",), seeds=1)) != stopped
    assert chosen(out=tmp_path / "here") == tmp_path / "here"


def test_resume_takes_a_folder_or_the_newest_below_one(stopped, tmp_path):
    assert chosen(resume=stopped) == stopped
    assert chosen(resume=launch.ROOT) == stopped
    with pytest.raises(DataError, match="an unfinished comparison"):
        chosen(resume=tmp_path / "none")
