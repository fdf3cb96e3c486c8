"""Text with and without domains, as a user may have it, becomes sequences; what cannot be read is said."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from equipoise.errors import ConfigError, DataError
from equipoise.evidence.prediction_data import read_text
from equipoise.lab.data.sources import load_corpus

WORDS = {"prose": "one two three four five", "digits": "0 1 2 3 4 5 6 7 8 9"}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path_factory.getbasetemp() / "prediction-cache"))


def documents(kind: str, count: int = 30, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS[kind].split(), k=120)) for _ in range(count)]


def lines(path, kinds, *, named=True, count=30):
    with open(path, "w", encoding="utf-8") as file:
        for kind in kinds:
            for one in documents(kind, count):
                file.write(json.dumps({"text": one} | ({"domain": kind} if named else {})) + "\n")
    return path


def test_a_file_without_domains_is_one(tmp_path):
    data, cut_off = read_text(lines(tmp_path / "mine.jsonl", WORDS, named=False), length=32)
    assert data.domains == ["mine"] and cut_off == []
    rows = data.train["mine"]
    assert rows.shape[1] == 33 and np.array_equal(rows[:-1, -1], rows[1:, 0])  # a window's last token begins the next


def test_domains_are_those_that_the_records_name(tmp_path):
    path = lines(tmp_path / "mine.jsonl", WORDS)
    assert read_text(path, length=32).data.domains == ["digits", "prose"]
    assert read_text(path, length=32, domains=["prose"]).data.domains == ["prose"]


def test_files_are_domains_and_shards_are_none(tmp_path):
    for kind in WORDS:
        for shard in range(2):
            lines(tmp_path / f"{kind}-{shard:05d}-of-00002.jsonl", [kind], named=False)
    assert read_text(tmp_path, length=32).data.domains == ["digits", "prose"]


@pytest.mark.parametrize("where", ["one.txt", "folder", "domains"])
def test_plain_text(tmp_path, where):
    text = "\n".join(documents("prose", 120))
    if where == "one.txt":
        path = tmp_path / where
        path.write_text(text, encoding="utf-8")
    else:
        path = tmp_path / where
        for number, kind in enumerate(WORDS):
            inner = path if where == "folder" else path / kind
            inner.mkdir(parents=True, exist_ok=True)
            for part in range(2):
                (inner / f"{number}-{part}.txt").write_text("\n".join(documents(kind, 40, part)), encoding="utf-8")
    found = read_text(path, length=16).data.domains
    assert found == (["digits", "prose"] if where == "domains" else ["one" if where == "one.txt" else "folder"])


def test_long_text_is_read_in_part(tmp_path):
    path = lines(tmp_path / "mine.jsonl", WORDS, count=200)
    data, cut_off = read_text(path, length=32, max_bytes=20_000)
    assert cut_off == ["digits", "prose"]
    assert len(data.train["prose"]) < len(read_text(path, length=32).data.train["prose"])


def test_one_document_is_enough(tmp_path):
    data, _ = read_text(lines(tmp_path / "mine.jsonl", ["prose"], count=1), length=16)
    assert len(data.train["prose"]) > 1


def test_the_folder_that_one_is_in(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("\n".join(documents("prose")), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert read_text(".", length=16).data.domains == [tmp_path.name]


def test_training_still_wants_domains(tmp_path):
    path = lines(tmp_path / "mine.jsonl", WORDS, named=False)
    with pytest.raises(DataError, match='"domain"'):
        load_corpus(path)


@pytest.mark.parametrize(
    ("make", "more", "words"),
    [
        (lambda folder: folder / "none.jsonl", {}, "no such file"),
        (lambda folder: folder, {}, "an empty folder"),
        (lambda folder: lines(folder / "a.jsonl", WORDS), {"domains": ["verse"]}, "verse"),
        (lambda folder: lines(folder / "a.jsonl", ["prose"], count=2), {"length": 4096}, "a sequence of 4096 tokens"),
        (lambda folder: lines(folder / "a.jsonl", ["prose"], count=1), {}, "a sequence of 256 tokens"),
        (lambda folder: lines(folder / "a.jsonl", WORDS), {"tokenizer": "nowhere"}, "no such folder"),
    ],
)
def test_text_that_cannot_be_read(tmp_path, make, more, words):
    with pytest.raises(DataError, match=words):
        read_text(make(tmp_path), **more)


@pytest.mark.parametrize(("name", "value"), [("length", 1), ("max_bytes", 0)])
def test_numbers_that_cannot_work(tmp_path, name, value):
    with pytest.raises(ConfigError, match=name.replace("_", "-")):
        read_text(lines(tmp_path / "a.jsonl", WORDS), **{name: value})
