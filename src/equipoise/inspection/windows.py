"""Text as token windows on the disk, one file per domain: read once, in a stream, up to so many tokens per domain.

    FOLDER/tokens/000.bin    token ids (uint32) of the first domain, window after window
    FOLDER/tokens/index.json written last: the domains, their numbers of windows, what was left out

So a pass needs memory for one micro-batch only, and a pass that goes on reads the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from ..errors import ConfigError, DataError, OutputError
from ..lab.data.corpus import LONGEST_DOCUMENT, embedded_corpus
from ..lab.data.sources import Part, find_parts, text_pieces
from ..storage.files import atomic_write
from .loading import Words, held_out, run_config

__all__ = ["Windows", "check_length", "read_windows", "source_files", "user_text", "windows_of_run", "write_windows"]

MOST_DOMAINS = 64
BATCH = 32  # documents that are tokenized at a time
INDEX = "index.json"
Progress = Callable[[str, float], None]
Document = tuple[str, str]  # domain, text
Streams = Callable[[], Iterator[tuple[str, np.ndarray]]]  # (domain, token ids), in any order


@dataclass(frozen=True)
class Windows:
    """Windows of S tokens by domain. ``problems`` says what was left out."""

    folder: Path
    domains: list[str]
    windows: list[int]  # of each domain
    length: int
    problems: list[str]

    @property
    def equal(self) -> int:
        """Windows that every domain has."""
        return min(self.windows)

    def read(self, domain: int, start: int, stop: int) -> np.ndarray:
        """(n, S) int64."""
        stop = min(stop, self.windows[domain])
        with open(self.folder / f"{domain:03d}.bin", "rb") as file:
            file.seek(4 * start * self.length)
            ids = np.fromfile(file, np.uint32, max(0, stop - start) * self.length)
        return ids.reshape(-1, self.length).astype(np.int64)

    def frequency(self, vocab_size: int, windows: int = 256) -> np.ndarray:
        """(V,) how often each token id occurs. Raises DataError for ids that the model has no embedding for."""
        counts_V = np.zeros(vocab_size, np.int64)
        for domain, number in enumerate(self.windows):
            for start in range(0, number, windows):
                ids = self.read(domain, start, start + windows)
                if ids.max() >= vocab_size:
                    raise DataError(expected=f"token ids below the model's {vocab_size:,}", got=str(ids.max()),
                                    do="pass the tokenizer of this model with --tokenizer")  # fmt: skip
                counts_V += np.bincount(ids.reshape(-1), minlength=vocab_size)
        return counts_V


def read_windows(folder: Path) -> Windows | None:
    """The windows that are in a folder, or None."""
    try:
        index = json.loads((folder / INDEX).read_bytes())
        return Windows(folder, index["domains"], index["windows"], index["length"], index["problems"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_windows(folder: Path, streams: Streams, length: int) -> Windows:
    """Cuts streams of token ids into windows, domains sorted by name.

    Raises DataError where no domain has a whole window, OutputError for a folder that cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _write(folder, streams(), length)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(expected=f"to write tokens into {folder}", got=error.strerror or str(error),
                          do="free disk space, or choose another --out") from None  # fmt: skip


def _write(folder: Path, streams: Iterable[tuple[str, np.ndarray]], length: int) -> Windows:
    counts: dict[str, int] = {}
    with ExitStack() as stack:
        files: dict[str, IO[bytes]] = {}
        for domain, ids in streams:
            if domain not in files:
                if len(files) == MOST_DOMAINS:
                    raise DataError(expected=f"at most {MOST_DOMAINS} domains", got="more",
                                    do="name those that matter with --domains")  # fmt: skip
                files[domain] = stack.enter_context(open(folder / f"new-{len(files):03d}.bin", "wb"))
            files[domain].write(ids.astype(np.uint32).tobytes())
            counts[domain] = counts.get(domain, 0) + len(ids)
    order = sorted(files)
    kept = [domain for domain in order if counts.get(domain, 0) >= length]
    if not kept:
        longest = max(counts.values(), default=0)
        raise DataError(expected=f"a domain with at least one window of {length} tokens", got=f"{longest} at most",
                        do="pass more text, or a smaller --length")  # fmt: skip
    problems = [f"{domain}: left out, its {counts.get(domain, 0)} tokens are less than a window of {length}"
                for domain in order if domain not in kept]  # fmt: skip
    for place, domain in enumerate(kept):
        (folder / f"new-{[*files].index(domain):03d}.bin").rename(folder / f"{place:03d}.bin")
    for rest in folder.glob("new-*.bin"):
        rest.unlink()
    made = Windows(folder, kept, [counts[domain] // length for domain in kept], length, problems)
    index = {"domains": made.domains, "windows": made.windows, "length": length, "problems": problems}
    atomic_write(folder / INDEX, json.dumps(index).encode())
    return made


def windows_of_run(folder: Path, tokens: int | None) -> tuple[int, Streams]:
    """(S, streams) of the held-out windows that a run of the lab measures itself with."""
    data = held_out(run_config(folder))
    length = data.sequence_length
    most = None if tokens is None else max(1, tokens // length)

    def streams() -> Iterator[tuple[str, np.ndarray]]:
        for domain in data.domains:
            yield domain, data.heldout[domain][:most, :-1].reshape(-1)

    return length, streams


def user_text(data: Path | None, words: Words, length: int, tokens: int | None, domains: Sequence[str] | None,
              progress: Progress | None) -> Streams:  # fmt: skip
    """Streams of token ids from the text of this installation (None) or from what `lab.data.sources` reads."""
    most = None if tokens is None else max(1, tokens // length) * length

    def streams() -> Iterator[tuple[str, np.ndarray]]:
        wanted = _Wanted(most, domains)
        documents = _own_documents(domains, progress) if data is None else _documents(data, wanted, progress)
        for batch in _batches(documents, wanted):
            for (domain, _), ids in zip(batch, words.encode([text for _, text in batch]), strict=True):
                kept = wanted.take(domain, [*ids, words.end] if words.end is not None else ids)
                if len(kept):
                    yield domain, kept
        wanted.check_found()

    return streams


class _Wanted:
    """How many tokens of which domain are still wanted."""

    def __init__(self, most: int | None, domains: Sequence[str] | None) -> None:
        self.most, self.domains = most, list(domains) if domains else None
        self.got: dict[str, int] = {}

    def wants(self, domain: str) -> bool:
        return (self.domains is None or domain in self.domains) and (
            self.most is None or self.got.get(domain, 0) < self.most
        )

    def full(self) -> bool:
        """Whether nothing more can be wanted: only where the domains are known."""
        return self.domains is not None and not any(map(self.wants, self.domains))

    def take(self, domain: str, ids: list[int]) -> np.ndarray:
        seen = self.got.get(domain, 0)
        kept = ids if self.most is None else ids[: self.most - seen]
        self.got[domain] = seen + len(kept)
        return np.array(kept, np.int64)

    def check_found(self) -> None:
        missing = [domain for domain in self.domains or [] if not self.got.get(domain)]
        if missing:
            raise DataError(expected=f"text of the domains {', '.join(self.domains or [])}",
                            got=f"none of {', '.join(missing)}", do="check the names given with --domains")  # fmt: skip


def source_files(data: Path | None) -> str:
    """Changes when the text does; reads no content."""
    if data is None:
        return "the text of this installation"
    return " ".join(
        f"{part.path} {part.path.stat().st_size} {part.path.stat().st_mtime_ns}" for part in find_parts(data)
    )


def _own_documents(domains: Sequence[str] | None, progress: Progress | None) -> Iterator[Document]:
    if domains and len(domains) < 2:  # that corpus is made of two or more
        known = embedded_corpus(progress=progress)
    else:
        known = embedded_corpus(list(domains) if domains else None, progress=progress)
    for domain in known.domains:
        yield from ((domain, text) for text in known.heldout[domain])


def _documents(data: Path, wanted: _Wanted, progress: Progress | None) -> Iterator[Document]:
    """Of a source with a held-out part, that part; of any other, all of it."""
    parts = find_parts(data)
    held = [part for part in parts if part.heldout]
    parts = held or parts
    sizes = [part.path.stat().st_size for part in parts]
    for i, part in enumerate(parts):
        if progress:
            progress(f"reading {part.path.name if part.rows else part.domain}", sum(sizes[:i]) / max(1, sum(sizes)))
        if wanted.full():
            return
        yield from _part(part, wanted)


def _part(part: Part, wanted: _Wanted) -> Iterator[Document]:
    """One file; it is left early when it is named after its domain and that one is full.

    Records that name no domain are of the one that the file is named after.
    """
    if part.domain is not None and not wanted.wants(part.domain):
        return
    own = part.domain or part.path.name.split(".")[0]
    only_own = True
    for domain, text, _ in part.rows(part.path, own) if part.rows else text_pieces(part):
        only_own = only_own and domain == own
        if wanted.wants(domain):
            for start in range(0, len(text), LONGEST_DOCUMENT):
                yield domain, text[start : start + LONGEST_DOCUMENT]
        elif only_own or wanted.full():
            return


def _batches(documents: Iterator[Document], wanted: _Wanted) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for domain, text in documents:
        if text.strip() and wanted.wants(domain):
            batch.append((domain, text))
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def check_length(length: int, longest: int | None) -> None:
    """Raises ConfigError for windows that the model has no positions for."""
    if length < 2 or (longest is not None and length > longest):
        raise ConfigError(expected=f"windows of 2 to {longest or 'any number of'} tokens", got=f"--length {length}",
                          do="choose a length that the model knows")  # fmt: skip
