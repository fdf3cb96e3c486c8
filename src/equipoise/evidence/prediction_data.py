"""The text of a prediction: read as the lab reads it, and also where nothing names a domain; cut into sequences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import ConfigError, DataError
from ..lab.data.corpus import Corpus, Progress
from ..lab.data.packing import PackedData, prepare
from ..lab.data.sources import load_corpus
from ..lab.data.tokenizer import END_ID, GivenTokenizer, get_tokenizer, given_tokenizer, load_tokenizer
from .prediction import LAW

__all__ = ["MAX_BYTES", "TextRead", "read_text"]

MAX_BYTES = 2_000_000  # of a domain: the gap is then known to a percent
TOGETHER = 32  # documents
LONGEST = 2**20


class TextRead(NamedTuple):
    """Sequences by domain, and the domains that were read in part only."""

    data: PackedData
    cut_off: list[str]


def read_text(
    data: str | Path | None = None,
    *,
    domains: Sequence[str] | None = None,
    length: int = 256,
    max_bytes: int = MAX_BYTES,
    tokenizer: str | Path | None = None,
    progress: Progress | None = None,
) -> TextRead:
    """Text as sequences of token ids.

    Args:
        data: what `lab.data.sources.load_corpus` reads, with or without domains; None: the text of this installation.
        domains: only these.
        length: tokens of a sequence.
        max_bytes: of each domain, from the start of its files.
        tokenizer: a Hugging Face folder with one; None: one is trained on this text, as the lab does.

    Raises ConfigError for numbers that cannot work, DataError for text that cannot be read or is shorter than a
    sequence, OutputError where the cache folder cannot be written.
    """
    for name, value, least, most in (("length", length, 2, LONGEST), ("max-bytes", max_bytes, 1, 2**40)):
        if not least <= value <= most:
            raise ConfigError(expected=f"--{name} of {least} to {most:,}", got=str(value), do="choose another number")
    size = LAW.settings["model.vocab_size"]
    given = None if tokenizer is None else given_tokenizer(_folder(Path(tokenizer).expanduser()))
    if data is None:
        packed = prepare(vocab_size=size, sequence_length=length, domains=domains, tokenizer=given, progress=progress)
        return TextRead(packed, [])
    corpus = load_corpus(
        Path(data).expanduser().resolve(), domains or None, max_bytes=max_bytes, progress=progress, by_file=True
    )
    read = {name: corpus.bytes_of(name) + corpus.bytes_of(name, heldout=True) for name in corpus.domains}
    packed = _cut(corpus, length, size, given, progress)
    return TextRead(packed, [name for name, bytes_read in read.items() if bytes_read >= max_bytes])


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise DataError(expected=f"a Hugging Face folder with a tokenizer at {path}", got="no such folder",
                        do="name the folder of a model, or leave --tokenizer out")  # fmt: skip
    return path


def _cut(corpus: Corpus, length: int, size: int, given: GivenTokenizer | None, progress: Progress | None) -> PackedData:
    """Training text as windows of length + 1; a domain's documents follow each other, and the rest falls away."""
    say = progress or (lambda _what, _share: None)
    if given is None:
        say("training the tokenizer", 0.0)
        tokenizer, end = get_tokenizer(corpus, size), END_ID
    else:
        tokenizer, end, size = load_tokenizer(given.path, given=True), given.end, given.size
    rows: dict[str, np.ndarray] = {}
    for place, name in enumerate(corpus.domains):
        say(f"cutting {name}", place / len(corpus.domains))
        documents, parts = corpus.train[name], []
        for start in range(0, len(documents), TOGETHER):
            batch = tokenizer.encode_batch_fast(documents[start : start + TOGETHER], add_special_tokens=False)
            parts += [np.array([*one.ids, end], np.uint32) for one in batch]
        tokens = np.concatenate(parts)
        if len(tokens) <= length:
            raise DataError(expected=f"a sequence of {length} tokens in the domain {name!r}",
                            got=f"{len(tokens) - 1:,} tokens", do="give it more text, lower --length, or leave it out "
                            "with --domains")  # fmt: skip
        windows = (len(tokens) - 1) // length
        rows[name] = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length][:windows]
    say("cutting", 1.0)
    path = Path() if given is None else given.path
    return PackedData(corpus.domains, corpus.sha256, size, rows, rows, {}, path, corpus.name)
