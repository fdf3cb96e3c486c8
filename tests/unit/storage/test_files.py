"""Files and folders are whole or absent, whatever stops the writer."""

from __future__ import annotations

import hashlib
import os

import pytest

from equipoise.errors import OutputError
from equipoise.storage import files
from equipoise.storage.files import atomic_folder, atomic_write, output_errors, sha256, write_whole


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_whole(path, b"old")
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"new")
    with pytest.raises(OutputError, match="make room"):
        atomic_write(path, b"new", do="make room")
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"old", ["a"])


def test_a_folder_appears_when_its_block_ends(tmp_path):
    target = tmp_path / "deep" / "out"
    with atomic_folder(target) as building:
        (building / "x").write_text("1")
        assert not target.exists()
    assert (target / "x").read_text() == "1"
    with pytest.raises(ZeroDivisionError), atomic_folder(target) as building:
        (building / "x").write_text(str(1 // 0))
    assert (target / "x").read_text() == "1"
    with atomic_folder(target) as building:
        (building / "y").write_text("3")
    assert [path.name for path in target.iterdir()] == ["y"]
    assert os.listdir(target.parent) == ["out"]


def test_a_file_in_the_way_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="to write"):
        atomic_write(tmp_path / "file" / "a", b"")
    with pytest.raises(OutputError, match="to write"), atomic_folder(tmp_path / "file" / "a"):
        pass


@pytest.mark.parametrize(("number", "said"), [(28, "free disk space, or choose"), (30, "choose"), (13, "choose")])
def test_room_is_advised_where_room_is_missing(number, said):
    with pytest.raises(OutputError) as caught, output_errors("it"):
        raise OSError(number, "no")
    assert caught.value.do.startswith(said)


def test_the_checksum_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 1000).hexdigest()
