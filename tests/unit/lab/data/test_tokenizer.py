"""The tokenizer: nothing is lost, bytes are counted exactly, training twice gives the same file."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.errors import ConfigError, DataError
from equipoise.lab.data.corpus import Corpus
from equipoise.lab.data.tokenizer import (
    END_OF_TEXT,
    bytes_per_id,
    get_tokenizer,
    load_tokenizer,
    tokenizer_file,
)

pytest.importorskip("tokenizers")

TRAIN = """
import sys
from pathlib import Path
from equipoise.lab.data.corpus import Corpus
from equipoise.lab.data.tokenizer import get_tokenizer
text = {"a": ["the cat sat on the mat and the dog " * 40 + str(i) for i in range(50)], "b": ["x = f(y, 1)\\n" * 99] * 9}
get_tokenizer(Corpus.build("toy", ["a", "b"], text, text), 400, cache=Path(sys.argv[1]))
"""


def small_corpus(repeats: int = 1) -> Corpus:
    text = {
        "english": [f"the quick brown fox {i} jumps over the lazy dog, and then {i * 7} " * 5 for i in range(200)],
        "code": [f"def function_{i}(argument): return argument[{i}] + {i * 3}\n" * 8 for i in range(200 * repeats)],
    }
    return Corpus.build("small", list(text), text, text)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return get_tokenizer(small_corpus(), 500, cache=tmp_path_factory.mktemp("cache"))


@given(st.text())
def test_any_text_comes_back_and_its_bytes_add_up(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert bytes_per_id(tokenizer)[ids].sum() == len(text.encode())


def test_text_that_spells_out_the_mark_is_not_the_mark(tokenizer, tmp_path):
    mark = tokenizer.token_to_id(END_OF_TEXT)
    text = f"one {END_OF_TEXT} two"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert mark not in ids
    assert tokenizer.decode(ids) == text
    assert bytes_per_id(tokenizer)[mark] == 0


def test_all_bytes_have_a_token_and_the_size_is_kept(tokenizer):
    assert tokenizer.get_vocab_size() == 500
    assert (bytes_per_id(tokenizer) == 1).sum() == 256
    assert bytes_per_id(tokenizer).max() <= 24


def test_the_hash_seed_and_threads_change_nothing(tmp_path):
    runs = [
        subprocess.Popen([sys.executable, "-c", TRAIN, str(tmp_path / seed)],
                         env={**os.environ, "PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": parallel})
        for seed, parallel in (("1", "true"), ("2", "false"))
    ]  # fmt: skip
    assert [run.wait() for run in runs] == [0, 0]
    files = sorted(tmp_path.glob("*/tokenizers/*.json"))
    assert len(files) == 2
    assert files[0].name == files[1].name
    assert len({hashlib.sha256(file.read_bytes()).hexdigest() for file in files}) == 1


def test_domains_weigh_the_same(tmp_path):
    """A domain with twenty times the text gets no more of the vocabulary: the same number of bytes is looked at."""
    sizes = []
    for repeats in (1, 20):
        corpus = small_corpus(repeats)
        tokenizer = get_tokenizer(corpus, 350, cache=tmp_path)
        sizes.append(sum(len(tokenizer.encode(text).ids) for text in small_corpus().heldout["english"]))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


def test_the_file_is_used_again_and_a_damaged_one_is_not(tmp_path):
    corpus = small_corpus()
    first = get_tokenizer(corpus, 300, cache=tmp_path).to_str()
    file = tokenizer_file(corpus.sha256, 300, tmp_path)
    content, stamp = file.read_bytes(), file.stat().st_mtime_ns
    assert get_tokenizer(corpus, 300, cache=tmp_path).to_str() == first
    assert file.stat().st_mtime_ns == stamp
    for damaged in (content[:2000], b"", b"{}"):
        file.write_bytes(damaged)
        with pytest.raises(DataError):
            load_tokenizer(file)
        assert get_tokenizer(corpus, 300, cache=tmp_path).to_str() == first
        assert file.read_bytes() == content


def test_little_text_gives_a_smaller_vocabulary(tmp_path):
    text = {"a": ["ab"], "b": ["cd"]}
    assert 257 <= get_tokenizer(Corpus.build("x", ["a", "b"], text, text), 1000, cache=tmp_path).get_vocab_size() < 270


@pytest.mark.parametrize("size", [256, 0, -1, 65_537, 2048.0, True, "2048"])
def test_a_vocabulary_that_cannot_work(size, tmp_path):
    with pytest.raises(ConfigError, match="vocabulary of 257"):
        get_tokenizer(small_corpus(), size, cache=tmp_path)
