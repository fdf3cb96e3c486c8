"""Text in domains, split into training and held-out; and the corpus that any installation holds already, no download.

The embedded corpus depends on the installed versions of Python, torch, numpy, sympy and networkx. Losses of two
machines may be compared only when the ``sha256`` of their corpora agree.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from ...errors import DataError, unknown_name
from ...storage.cache import OTHER_CACHE, cache_folder
from ...storage.files import atomic_write
from .installed_text import DOMAINS, Domain, Unit

__all__ = ["Corpus", "Deduplicator", "Progress", "check_domains", "embedded_corpus", "embedded_fingerprint",
           "hash_fraction"]  # fmt: skip

Progress = Callable[[str, float], None]  # what is being done, and the share of it that is done (0 to 1)

TRAIN_BYTES = 4_000_000  # per domain; reading stops there
HELDOUT_BYTES = 400_000
LEAST_HELDOUT_BYTES = 150_000
LEAST_DOMAIN_BYTES = 2_000_000
HELDOUT_FRACTION = 0.05
LONGEST_DOCUMENT = 20_000  # characters
SHORTEST_DOCUMENT = 200
PIECES_PER_UNIT = 4  # so that no single file fills a domain


@dataclass(frozen=True)
class Corpus:
    """Documents by domain. ``sha256`` covers every byte, the domains' names and their order."""

    name: str
    domains: list[str]
    train: dict[str, list[str]]
    heldout: dict[str, list[str]]
    sha256: str

    @classmethod
    def build(
        cls, name: str, domains: Sequence[str], train: dict[str, list[str]], heldout: dict[str, list[str]]
    ) -> Corpus:
        """A corpus with its checksum.

        >>> Corpus.build("toy", ["a"], {"a": ["one"]}, {"a": ["two"]}).sha256[:8]
        '566ac4da'
        """
        digest = hashlib.sha256()
        for domain in domains:
            for split, documents in (("train", train[domain]), ("heldout", heldout[domain])):
                digest.update(f"{len(domain)}:{domain}:{split}:{len(documents)}:".encode())
                for document in documents:
                    content = document.encode()
                    digest.update(b"%d:" % len(content))
                    digest.update(content)
        return cls(name, list(domains), train, heldout, digest.hexdigest())

    def bytes_of(self, domain: str, *, heldout: bool = False) -> int:
        """UTF-8 bytes of a domain's training (or held-out) text."""
        return sum(len(document.encode()) for document in (self.heldout if heldout else self.train)[domain])


def embedded_corpus(domains: Sequence[str] | None = None, *, progress: Progress | None = None,
                    cache: Path | None = None) -> Corpus:  # fmt: skip
    """The text of this installation: Python code, English documentation, C++ headers, bytecode, mathematics, tables.

    ``domains`` selects some of them (None: all that hold at least 2 MB here; the others are named in a warning).
    A file goes as a whole to training or to the held-out part, by a hash of its name. The result is cached, and is the
    same for the same installed versions and any hash seed. Raises DataError for an unknown domain, for one that
    this installation cannot fill, and when fewer than two remain of all; one alone has to be named.
    """
    wanted = check_domains(domains, DOMAINS)
    path = (cache or cache_folder()) / "corpus" / f"{embedded_fingerprint(wanted)}.json.gz"
    corpus = _load(path)
    if corpus is None:
        corpus = _build(wanted, required=domains is not None, progress=progress)
        atomic_write(path, gzip.compress(json.dumps(asdict(corpus)).encode(), 1, mtime=0), do=OTHER_CACHE)
    return corpus


def embedded_fingerprint(domains: Sequence[str] | None = None) -> str:
    """Changes whenever the embedded corpus may: versions, names and sizes of its files, and the code that cuts them."""
    names = list(domains) if domains else list(DOMAINS)
    digest = hashlib.sha256(f"{TRAIN_BYTES} {HELDOUT_BYTES} {sys.version}".encode())
    for code in ("corpus.py", "installed_text.py"):
        digest.update(Path(__file__).with_name(code).read_bytes())
    for package in ("torch", "numpy", "sympy", "networkx"):
        with suppress(metadata.PackageNotFoundError):  # then its domains come out empty
            digest.update(f" {package}={metadata.version(package)}".encode())
    for name in names:
        for unit in DOMAINS[name].units():
            digest.update(f"{name} {unit.name} {unit.size}\n".encode())
    return digest.hexdigest()[:32]


def check_domains(domains: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """The selected domains, or all known ones. Raises DataError for an unknown or repeated name, and for one
    domain alone that was not named: a control with nothing to specialize in has to be meant.
    """
    known = list(known)
    if domains is None:
        chosen = known
    elif isinstance(domains, str):
        raise DataError(expected="a list of domains", got=repr(domains), do=f"pass domains=[{domains!r}, ...]")
    else:
        chosen = list(domains)
    for name in chosen:
        if name not in known:
            error = unknown_name("domain", name, known)
            raise DataError(expected=error.expected, got=error.got, do=error.do)
        if chosen.count(name) > 1:
            raise DataError(expected="every domain once", got=f"{name!r} {chosen.count(name)} times", do="name it once")
    if len(chosen) < (2 if domains is None else 1):
        raise DataError(expected="at least two domains of text", got=f"{len(chosen)}: {', '.join(chosen) or 'none'}",
                        do="add text of another kind: without it there is nothing to specialize in. As a control, one "
                           "domain can be named: --domains NAME")  # fmt: skip
    return chosen


def hash_fraction(key: str) -> float:
    """A number in [0, 1) that depends on ``key`` only: decides splits and orders the same way everywhere.

    >>> round(hash_fraction("stdlib/json/decoder.py"), 6)
    0.826702
    """
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64


class Deduplicator:
    """Finds documents that repeat earlier ones: the same but for case and white space, or half of it copied.

    "Half" is measured on hashes of 64-byte windows, about one in 32 of them, chosen by their content, so that a copy
    is found at any offset.

    >>> seen = Deduplicator()
    >>> text = " ".join(str(n * n) for n in range(400))
    >>> [seen.is_new(t) for t in (text, text.replace(" ", "  "), "# a header of its own " + text, text[::-1])]
    [True, False, False, True]
    """

    WINDOW = 64
    SAMPLE_BITS = 5
    COPIED = 0.5
    _FACTOR = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64

    def __init__(self) -> None:
        self._documents: set[bytes] = set()
        self._windows: set[int] = set()
        self._powers = np.ones(1, np.uint64)
        self._inverses = np.ones(1, np.uint64)

    def is_new(self, text: str) -> bool:
        """True, and remembers it, when the document repeats none of the earlier ones."""
        plain = "".join(text.lower().split()).encode()
        exact = hashlib.blake2b(plain, digest_size=16).digest()
        windows = self._sample(plain)
        if exact in self._documents or (windows and len(windows & self._windows) > self.COPIED * len(windows)):
            return False
        self._documents.add(exact)
        self._windows |= windows
        return True

    def _sample(self, content: bytes) -> set[int]:
        """Polynomial hashes of all windows by one running sum; everything is modulo 2^64, where numpy wraps around."""
        if len(content) < self.WINDOW:
            return set()
        if len(self._powers) <= len(content):
            count = 2 * len(content)
            inverse = pow(self._FACTOR, -1, 2**64)
            self._powers = np.cumprod(np.array([1] + [self._FACTOR] * count, np.uint64), dtype=np.uint64)
            self._inverses = np.cumprod(np.array([1] + [inverse] * count, np.uint64), dtype=np.uint64)
        terms = (np.frombuffer(content, np.uint8).astype(np.uint64) + np.uint64(1)) * self._powers[: len(content)]
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])
        hashes = (sums[self.WINDOW :] - sums[: -self.WINDOW]) * self._inverses[: len(sums) - self.WINDOW]
        hashes ^= hashes >> np.uint64(29)  # the low bits of such a hash alone are poor
        hashes *= np.uint64(0xBF58476D1CE4E5B9)
        return set(hashes[hashes >> np.uint64(64 - self.SAMPLE_BITS) == 0].tolist())


def _build(names: list[str], *, required: bool, progress: Progress | None) -> Corpus:
    train: dict[str, list[str]] = {}
    heldout: dict[str, list[str]] = {}
    for name in names:
        train_part, heldout_part = _fill(name, DOMAINS[name], progress)
        size = sum(len(text.encode()) for text in train_part + heldout_part)
        if size >= LEAST_DOMAIN_BYTES and heldout_part:
            train[name], heldout[name] = train_part, heldout_part
            continue
        found = f"{name}: {size / 1e6:.1f} MB of {LEAST_DOMAIN_BYTES / 1e6:.0f} MB"
        if required:
            raise DataError(expected=f"enough text for the domain {name!r} in this installation", got=found,
                            do=f"leave it out, or install what it is cut from: {DOMAINS[name].about}")  # fmt: skip
        warnings.warn(f"this installation holds too little text for a domain, it is left out: {found}", stacklevel=3)
    if len(train) < 2 and not required:
        raise DataError(expected="at least two domains of text in this installation", got=f"{len(train)}: {[*train]}",
                        do="pass your own text with --data")  # fmt: skip
    return Corpus.build("embedded", list(train), train, heldout)


def _fill(name: str, domain: Domain, progress: Progress | None) -> tuple[list[str], list[str]]:
    """Walks the units by the hash of their names: the lowest are held out, then training fills up to its cap.

    Held-out comes first so that a training document which repeats held-out text is the one that falls out.
    """
    train: list[str] = []
    heldout: list[str] = []
    seen = Deduplicator()
    train_size = heldout_size = 0
    for unit in sorted(domain.units(), key=lambda unit: (hash_fraction(unit.name), unit.name)):
        held = heldout_size < LEAST_HELDOUT_BYTES or hash_fraction(unit.name) < HELDOUT_FRACTION
        if held and heldout_size >= HELDOUT_BYTES:
            continue
        for text in _documents(unit, domain):
            if not seen.is_new(text):
                continue
            (heldout if held else train).append(text)
            if held:
                heldout_size += len(text.encode())
            else:
                train_size += len(text.encode())
        if progress:
            progress(f"reading {name}", min(1.0, train_size / TRAIN_BYTES))
        if train_size >= TRAIN_BYTES:
            break
    if progress:
        progress(f"reading {name}", 1.0)
    return train, heldout


def _documents(unit: Unit, domain: Domain) -> Iterator[str]:
    """The unit's text in pieces of at most 20,000 characters, cut at line ends. Broken files give nothing."""
    try:
        text = domain.extract(unit.read())
    except (SyntaxError, ValueError, OSError, RecursionError):  # ValueError: also bytes that are not UTF-8
        return
    start = 0
    for _ in range(PIECES_PER_UNIT):
        end = start + LONGEST_DOCUMENT
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        piece = text[start:end].strip("\n")
        if len(piece) >= SHORTEST_DOCUMENT:
            yield piece
        start = end


def _load(path: Path) -> Corpus | None:
    """A cached corpus whose checksum holds, or None."""
    try:
        data = json.loads(gzip.decompress(path.read_bytes()))
        corpus = Corpus.build(data["name"], data["domains"], data["train"], data["heldout"])
        return corpus if corpus.sha256 == data["sha256"] else None
    except (
        OSError,
        EOFError,
        zlib.error,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ):  # missing, damaged, not ours
        return None
