"""Packing, its cache, and the batches: against naive loops, in several processes, with damaged files."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import ConfigError, DataError, OutputError
from equipoise.lab.data import packing as data_module
from equipoise.lab.data.packing import MIXES, BatchSampler, PackedData, describe, pack, prepare, receive, send
from equipoise.lab.data.tokenizer import END_OF_TEXT, load_tokenizer

pytest.importorskip("tokenizers")

PREPARE = """
import sys
from equipoise.lab.data.packing import prepare
packed = prepare(sys.argv[1], vocab_size=300, sequence_length=16, cache=__import__("pathlib").Path(sys.argv[2]))
print(sum(int(rows.sum()) for split in (packed.train, packed.heldout) for rows in split.values()))
"""
SMALL: dict[str, Any] = {"vocab_size": 300, "sequence_length": 16}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "my.jsonl"
    rng = random.Random(0)
    words = {
        "prose": ["the", "cat", "sat", "on", "a", "mat"],
        "zahlen": [*map(str, range(99))],
        "ünï": list("äöü€漢字 "),
    }
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(150):
            for domain, choices in words.items():
                text = " ".join(rng.choices(choices, k=rng.randint(5, 120)))
                file.write(json.dumps({"text": text, "domain": domain}) + "\n")
    return path


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory) -> PackedData:
    return prepare(source, cache=tmp_path_factory.mktemp("cache"), **SMALL)


def arrays(packed: PackedData) -> list[np.ndarray]:
    return [*packed.train.values(), *packed.heldout.values()]


def same(one: PackedData, two: PackedData) -> bool:
    return one.heldout_bytes == two.heldout_bytes and all(map(np.array_equal, arrays(one), arrays(two)))


# ------------------------------------------------------------------------------------------------- packing


@given(st.lists(st.text(max_size=40), max_size=12), st.integers(1, 9), st.none() | st.integers(1, 60))
def test_packing_against_a_loop(packed, documents, length, limit):
    tokenizer = load_tokenizer(packed.tokenizer_path)
    stream: list[int] = []
    for text in documents:
        stream += [*tokenizer.encode(text).ids, tokenizer.token_to_id(END_OF_TEXT)]
    expected = []
    place = 0
    while place + length + 1 <= len(stream) and (limit is None or place + length <= limit):
        expected.append(stream[place : place + length + 1])
        place += length
    rows = pack(documents, tokenizer, length, limit)
    assert rows.dtype == np.uint16
    assert rows.shape == (len(expected), length + 1)
    assert rows.tolist() == expected


def test_what_prepare_gives(packed, source):
    assert packed.domains == ["prose", "zahlen", "ünï"]
    assert (packed.vocab_size, packed.sequence_length, packed.name) == (300, 16, "my.jsonl")
    for rows in arrays(packed):
        assert rows.shape[1] == 17
        assert rows.dtype == np.uint16
        assert isinstance(rows, np.memmap)
        assert rows.max() < 300
    for rows in packed.train.values():
        assert np.array_equal(rows[:-1, -1], rows[1:, 0])  # neighbours share a token, so each is a target once


def test_heldout_bytes_are_those_of_the_targets(source, tmp_path):
    """With S = 1 every token but the first is a target: the bytes are those of the text less the first token's."""
    from equipoise.lab.data.sources import load_corpus

    packed = prepare(source, vocab_size=300, sequence_length=1, max_heldout_tokens=None, cache=tmp_path)
    corpus = load_corpus(source)
    tokenizer = load_tokenizer(packed.tokenizer_path)
    for domain in packed.domains:
        first = tokenizer.encode(corpus.heldout[domain][0]).tokens[0]
        assert packed.heldout_bytes[domain] == corpus.bytes_of(domain, heldout=True) - len(first)


def test_heldout_windows_are_a_fair_sample_and_capped(source, tmp_path):
    whole = prepare(source, cache=tmp_path, max_heldout_tokens=None, **SMALL)
    some = prepare(source, cache=tmp_path, max_heldout_tokens=64, max_train_tokens=320, **SMALL)
    tokenizer = load_tokenizer(some.tokenizer_path)
    for domain in ("prose", "zahlen"):  # one byte a character
        assert len(some.heldout[domain]) == 4
        assert np.array_equal(some.heldout[domain], whole.heldout[domain][:4])
        assert np.array_equal(some.train[domain], whole.train[domain][:20])
        decoded = [tokenizer.decode(row[1:].tolist(), skip_special_tokens=True) for row in some.heldout[domain]]
        assert some.heldout_bytes[domain] == sum(map(len, decoded))
        neighbours = whole.heldout[domain][:-1, -1] == whole.heldout[domain][1:, 0]
        assert not neighbours.all()


# ------------------------------------------------------------------------------------------------- the cache


def test_the_second_time_reads_no_text(source, tmp_path, monkeypatch):
    said: list[tuple[str, float]] = []
    first = prepare(source, cache=tmp_path, progress=lambda what, share: said.append((what, share)), **SMALL)
    assert [what.split()[0] for what, _ in said].count("packing") == 4
    assert all(0 <= share <= 1 for _, share in said)
    monkeypatch.setattr(data_module, "load_corpus", lambda *_, **__: pytest.fail("read again"))
    assert same(prepare(str(source), cache=tmp_path, **SMALL), first)


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "meta", "no meta", "tokenizer", "note"])
def test_a_damaged_cache_is_built_again(source, tmp_path, damage):
    first = prepare(source, cache=tmp_path, **SMALL)
    expected = [rows.copy() for rows in arrays(first)]
    (folder,) = (tmp_path / "packed").iterdir()
    victim = {"meta": folder / "meta.json", "no meta": folder / "meta.json", "tokenizer": first.tokenizer_path,
              "note": next((tmp_path / "sources").iterdir())}.get(damage, folder / "train-1.npy")  # fmt: skip
    content = victim.read_bytes()
    victim.unlink()
    if damage not in ("remove", "no meta"):
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        victim.write_bytes(flipped if damage == "flip" else content[:middle])
    again = prepare(source, cache=tmp_path, **SMALL)
    assert all(map(np.array_equal, arrays(again), expected))
    assert victim.read_bytes() == content
    assert [path.name for path in (tmp_path / "packed").iterdir()] == [folder.name]


def test_a_build_that_is_stopped_leaves_nothing(source, tmp_path):
    def stop(what: str, share: float) -> None:
        if what == "packing zahlen":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, cache=tmp_path, progress=stop, **SMALL)
    assert list((tmp_path / "packed").iterdir()) == []
    assert prepare(source, cache=tmp_path, **SMALL).domains


def test_two_processes_at_once(source, packed, tmp_path):
    runs = [subprocess.Popen([sys.executable, "-c", PREPARE, str(source), str(tmp_path)], stdout=subprocess.PIPE,
                             text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(3)]  # fmt: skip
    sums = {run.communicate()[0].strip() for run in runs}
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert sums == {str(sum(int(rows.sum()) for rows in arrays(packed)))}
    assert len(list((tmp_path / "packed").iterdir())) == 1


def test_every_choice_has_its_own_entry(source, tmp_path):
    first = prepare(source, cache=tmp_path, **SMALL)
    longer = prepare(source, cache=tmp_path, vocab_size=300, sequence_length=24)
    bigger = prepare(source, cache=tmp_path, vocab_size=310, sequence_length=16)
    fewer = prepare(source, cache=tmp_path, domains=("ünï", "prose"), **SMALL)
    shorter = prepare(source, cache=tmp_path, max_bytes=9_000, **SMALL)
    assert (longer.sequence_length, bigger.vocab_size, fewer.domains) == (24, 310, ["ünï", "prose"])
    assert len({first.corpus_sha256, fewer.corpus_sha256, shorter.corpus_sha256}) == 3
    assert first.corpus_sha256 == longer.corpus_sha256 == bigger.corpus_sha256
    assert len(shorter.train["prose"]) < len(first.train["prose"])
    assert same(prepare(source, cache=tmp_path, domains=(), **SMALL), first)


def test_a_changed_file_is_read_again(source, tmp_path):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(source.read_bytes())
    first = prepare(copy, cache=tmp_path, **SMALL)
    copy.write_bytes(source.read_bytes().replace(b"cat", b"dog"))
    assert prepare(copy, cache=tmp_path, **SMALL).corpus_sha256 != first.corpus_sha256


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"sequence_length": 0}, "sequence_length >= 1"),
        ({"sequence_length": 16.0}, "sequence_length"),
        ({"vocab_size": 100}, "vocabulary of 257"),
        ({"max_train_tokens": 16}, "max_train_tokens >= 17"),
        ({"max_heldout_tokens": 3}, "max_heldout_tokens >= 17"),
    ],
)
def test_sizes_that_cannot_work(source, tmp_path, arguments, said):
    with pytest.raises(ConfigError, match=said):
        prepare(source, cache=tmp_path, **SMALL | arguments)


def test_a_domain_with_too_little_text(source, tmp_path):
    with pytest.raises(DataError, match="domain 'prose'"):
        prepare(source, cache=tmp_path, vocab_size=300, sequence_length=5000)
    with pytest.raises(DataError, match="did you mean 'prose'"):
        prepare(source, cache=tmp_path, domains=["prosa", "zahlen"], **SMALL)
    with pytest.raises(DataError, match="a list of domains"):
        prepare(source, cache=tmp_path, domains="prose", **SMALL)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="EQUIPOISE_CACHE"):
        prepare(source, cache=tmp_path / "file" / "cache", **SMALL)


def test_packed_text_on_another_machine(packed, tmp_path):
    folder = receive(send(packed), cache=tmp_path)
    there = prepare(folder, cache=tmp_path / "untouched", **SMALL)
    assert same(there, packed) and there.corpus_sha256 == packed.corpus_sha256
    assert there.tokenizer_path.read_bytes() == packed.tokenizer_path.read_bytes()
    assert not (tmp_path / "untouched").exists()
    with pytest.raises(DataError, match="sequence length"):
        prepare(folder, cache=tmp_path, vocab_size=300, sequence_length=24)
    with pytest.raises(DataError, match="domains"):
        prepare(folder, cache=tmp_path, domains=("prose",), **SMALL)
    for name in ("train-0.npy", "tokenizer.json", "meta.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1])
        with pytest.raises(DataError, match="as it was sent"):
            prepare(folder, cache=tmp_path, **SMALL)
        assert receive(send(packed), cache=tmp_path) == folder  # puts it right
        assert (folder / name).read_bytes() == content


def test_the_table_fits_a_terminal(packed):
    table = describe(packed)
    assert all(len(line) <= 80 for line in table.splitlines())
    assert f"{packed.train['zahlen'].shape[0] * 16:,}" in table
    assert packed.corpus_sha256[:16] in table
    long = "a domain with a name that is much longer than a column" * 2
    wide = PackedData(
        [long], "", 300, {long: packed.train["prose"]}, {long: packed.heldout["prose"]}, {long: 1}, Path()
    )
    assert all(len(line) <= 80 for line in describe(wide).splitlines())


# ------------------------------------------------------------------------------------------------- batches


def toy(sizes: list[int], length: int = 2) -> PackedData:
    """Windows that say what they are: (domain, place, 0)."""
    rows = {f"d{d}": np.array([[d, i, 0] for i in range(n)], np.uint16) for d, n in enumerate(sizes)}
    return PackedData(list(rows), "", 300, rows, rows, dict.fromkeys(rows, 1), Path())


shapes = st.tuples(
    st.lists(st.integers(1, 7), min_size=2, max_size=5), st.integers(1, 4), st.integers(1, 6), st.sampled_from(MIXES),
    st.integers(0, 2**40),
)  # fmt: skip


@given(shapes)
@settings(max_examples=60)
def test_the_law_of_the_batches(shape):
    """Sizes and types; one domain a micro-batch; even over steps; nothing twice within an epoch; tokens fit labels."""
    sizes, per_batch, micro_batches, mix, seed = shape
    batches = BatchSampler(
        toy(sizes), seed=seed, sequences_per_micro_batch=per_batch, micro_batches=micro_batches, mix=mix
    )
    assert batches.tokens_per_step == per_batch * micro_batches * 2
    drawn: list[list[int]] = [[] for _ in sizes]
    turn = per_batch if mix == "micro_batch" else 1
    for index in range(8):
        step = batches.step(index)
        assert len(step) == micro_batches
        before = [len(seen) for seen in drawn]
        for tokens, labels in step:
            assert tokens.dtype == labels.dtype == torch.int64
            assert tokens.shape == (per_batch, 3)
            assert torch.equal(tokens[:, 0], labels)
            if mix == "micro_batch":
                assert len(set(labels.tolist())) == 1
            for domain, place, _ in tokens.tolist():
                drawn[domain].append(place)
        given_now = [len(seen) - b for seen, b in zip(drawn, before, strict=True)]
        assert max(given_now) - min(given_now) <= turn
        assert max(map(len, drawn)) - min(map(len, drawn)) <= turn
    for size, seen in zip(sizes, drawn, strict=True):
        # within a step the turns are shuffled, so an epoch's border may lie inside one: count instead of cutting
        counts = Counter(seen)
        whole = len(seen) // size
        assert all(whole <= counts[place] <= whole + 1 for place in range(size))


@given(shapes, st.permutations(range(6)))
@settings(max_examples=30)
def test_a_step_depends_on_seed_and_number_alone(shape, order):
    sizes, per_batch, micro_batches, mix, seed = shape
    options = {"sequences_per_micro_batch": per_batch, "micro_batches": micro_batches, "mix": mix}
    batches = BatchSampler(toy(sizes), seed=seed, **options)
    forward = [batches.step(index) for index in range(6)]
    for index in order:
        fresh = BatchSampler(toy(sizes), seed=seed, **options).step(index)
        for one, two, three in zip(forward[index], batches.step(index), fresh, strict=True):
            assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, three, strict=True))


def test_seeds_and_epochs_differ():
    def places(seed: int, steps: range) -> list[int]:
        batches = BatchSampler(toy([64, 64]), seed=seed, sequences_per_micro_batch=8, micro_batches=2)
        return [
            row[1]
            for i in steps
            for batch in batches.step(i)
            if batch.domain_ids_B[0] == 0
            for row in batch.tokens_BS.tolist()
        ]

    assert places(0, range(8)) != places(1, range(8))
    assert places(0, range(8)) != places(0, range(8, 16))
    assert sorted(places(0, range(8))) == sorted(places(0, range(8, 16))) == list(range(64))


def test_the_order_of_domains_inside_a_step_is_random():
    batches = BatchSampler(toy([50, 50, 50]), seed=0, sequences_per_micro_batch=1, micro_batches=3)
    orders = {tuple(int(batch.domain_ids_B) for batch in batches.step(index)) for index in range(60)}
    assert len(orders) == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"seed": -1}, "seed >= 0"),
        ({"sequences_per_micro_batch": 0}, "sequences_per_micro_batch >= 1"),
        ({"micro_batches": 0}, "micro_batches >= 1"),
        ({"micro_batches": 2.0}, "micro_batches"),
        ({"mix": "sequnce"}, "did you mean 'sequence'"),
    ],
)
def test_batches_that_cannot_work(arguments, said):
    options = {"seed": 0, "sequences_per_micro_batch": 1, "micro_batches": 1} | arguments
    with pytest.raises(ConfigError, match=said):
        BatchSampler(toy([3, 3]), **options)


def test_other_batches_that_cannot_work():
    with pytest.raises(ConfigError, match="index >= 0"):
        BatchSampler(toy([3, 3]), seed=0, sequences_per_micro_batch=1, micro_batches=1).step(-1)
    empty = toy([3, 3])
    empty.train["d1"] = empty.train["d1"][:0]
    with pytest.raises(DataError, match="d1"):
        BatchSampler(empty, seed=0, sequences_per_micro_batch=1, micro_batches=1)
