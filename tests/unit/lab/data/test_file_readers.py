"""Records come from plain and compressed files alike, and what is wrong with one is named by file and line."""

from __future__ import annotations

import gzip
import lzma

import pytest

from equipoise.errors import DataError
from equipoise.lab.data.file_readers import json_rows, read_text

LINES = '{"text": "one", "domain": "a"}\n\n{"text": "two"}\n'


@pytest.mark.parametrize(("name", "pack"), [("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("a.xz", lzma.compress)])
def test_records_of_plain_and_compressed_files(tmp_path, name, pack):
    path = tmp_path / name
    path.write_bytes(pack(LINES.encode()))
    assert list(json_rows(path, "b")) == [("a", "one", f"{path}:1"), ("b", "two", f"{path}:3")]
    with pytest.raises(DataError, match=":3"):
        list(json_rows(path))


@pytest.mark.parametrize(
    ("text", "says"),
    [("", "a.jsonl"), ("[]\n", "a.jsonl:1"), ('{"text": "x"', "cut off"), ('{"text": x}\n', "remove this line")],
)
def test_a_bad_file_is_a_data_error(tmp_path, text, says):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError) as caught:
        list(json_rows(tmp_path / "a.jsonl", "d"))
    assert says in str(caught.value)


def test_line_ends_become_a_line_feed(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n")
    assert read_text(tmp_path / "a.txt") == "one\ntwo\n"
