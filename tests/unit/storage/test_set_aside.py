"""`--overwrite` never ends with nothing: what was there comes back unless its successor has begun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from equipoise.errors import OutputError
from equipoise.storage import set_aside as set_aside_module
from equipoise.storage.set_aside import ASIDE, bring_back, set_aside

NAMES = ("record", "folder", "absent")


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "record").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "weights").write_text("old")
    (tmp_path / "mine").write_text("mine")
    return tmp_path


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


OLD = {"folder/weights": "old", "mine": "mine", "record": "old"}


def replace(folder: Path, error: BaseException, *, counts: bool) -> None:
    with set_aside(folder, NAMES) as forget:
        assert not (folder / "record").exists() and (folder / ASIDE / "folder" / "weights").read_text() == "old"
        (folder / "record").write_text("new")
        (folder / "absent").write_text("new")
        if counts:
            forget()
        raise error


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), SystemExit()])
def test_an_error_before_the_successor_counts_brings_it_back(folder, error):
    with pytest.raises(type(error)):
        replace(folder, error, counts=False)
    assert contents(folder) == OLD


def test_once_it_counts_the_old_is_gone_whatever_comes(folder):
    with pytest.raises(ValueError, match="later"):
        replace(folder, ValueError("later"), counts=True)
    assert contents(folder) == {"absent": "new", "mine": "mine", "record": "new"}


def test_a_kill_while_the_old_is_removed_brings_none_of_it_back(folder, monkeypatch):
    """Half of an old run over a new one would be neither."""

    def killed(path, **_):
        if (path / "record").exists():
            (path / "record").unlink()
            raise SystemExit(9)

    with monkeypatch.context() as patched:
        patched.setattr(set_aside_module.shutil, "rmtree", killed)
        with pytest.raises(SystemExit):
            replace(folder, ValueError(), counts=True)
    assert "folder/weights" in {name.partition("/")[2] for name in contents(folder)}, "some of it was left"
    bring_back(folder)
    assert contents(folder) == {"absent": "new", "mine": "mine", "record": "new"}


def test_without_an_error_the_old_is_gone(folder):
    with set_aside(folder, NAMES):
        (folder / "record").write_text("new")
    assert contents(folder) == {"mine": "mine", "record": "new"} and not (folder / ASIDE).exists()


@pytest.mark.parametrize("then", ["bring_back", "set_aside"])
def test_after_a_kill_the_next_process_finds_it(folder, then):
    code = (
        "import sys; from pathlib import Path; from equipoise.storage.set_aside import set_aside\n"
        "with set_aside(Path(sys.argv[1]), ['record', 'folder']):\n"
        "    (Path(sys.argv[1]) / 'record').write_text('half'); print('ready', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == b"ready\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stdin.close()
    if then == "bring_back":
        bring_back(folder)
    else:
        with pytest.raises(KeyError):
            replace(folder, KeyError(), counts=False)
    assert contents(folder) == OLD


def test_a_folder_that_cannot_be_written_says_so(folder, monkeypatch):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OutputError, match="Read-only file system"):
        replace(folder, KeyError(), counts=False)
    assert contents(folder) == OLD
