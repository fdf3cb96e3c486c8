"""A user's own text: JSON lines, parquet, a Hugging Face dataset on disk, or a folder of text files per domain.

    data.jsonl[.gz|.xz|.zst]      one {"text": ..., "domain": ...} object a line
    data.parquet                  the columns text and domain
    folder/                       several such files; those named x.val.jsonl, test.parquet, ... are held out
    folder/german/*, folder/c/*   text files; the folder's name is the domain
    folder/{train,val}/german/*   the same, with a held-out part
    saved_dataset/                what datasets.save_to_disk wrote, with its splits

Where nothing is marked as held out, a hash of the document decides. Reading stops at a number of bytes per domain.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError, DataError
from .corpus import HELDOUT_FRACTION, LONGEST_DOCUMENT, Corpus, Progress, check_domains, hash_fraction
from .file_readers import arrow_rows, json_rows, parquet_rows, read_text

__all__ = ["Part", "find_parts", "load_corpus", "source_fingerprint", "text_pieces"]

MAX_BYTES = 5_000_000  # of training text per domain
HELDOUT_SHARE = 5  # held-out text is read up to a fifth of that
LEAST_HELDOUT_BYTES = 50_000  # wanted where a hash decides, but no more than 2 % of the domain
HELDOUT_NAMES = {"val", "valid", "validation", "heldout", "held-out", "test", "dev"}
TRAIN_NAMES = {"train", "training"}
SHARD = re.compile(r"-\d+(-of-\d+)?$")  # ends the name of one of several files of the same text
RECORDS = {".json", ".csv", ".tsv", ".arrow", ".npy", ".bin"}  # files that are no text, and are not read as such
COMPRESSED = (".gz", ".xz", ".zst")
ACCEPTED = "a .jsonl (also .gz, .xz, .zst) or .parquet file, a folder of them or of text per domain, or a saved dataset"

Row = tuple[str, str, str]  # domain, text, the place it stands in ("file:line")


@dataclass(frozen=True)
class Part:
    """One file of a corpus."""

    path: Path
    rows: Callable[..., Iterator[Row]] | None  # None: a plain text file
    heldout: bool | None  # None: not marked
    domain: str | None = None  # known before reading: the folder's name


def load_corpus(path: str | Path, domains: Sequence[str] | None = None, *, max_bytes: int | None = MAX_BYTES,
                progress: Progress | None = None, by_file: bool = False) -> Corpus:  # fmt: skip
    """Reads a user's text (the forms above); ``domains`` selects some, in this order (None: all, sorted by name).

    At most ``max_bytes`` of each domain's training text are read (None: all), from the start of its files. A file named
    after its domain (german.jsonl, german.train.jsonl.xz) is left as soon as that domain is full. ``by_file`` takes
    what names no domain too: records are of their file's name, text files in no folder one domain; one is then enough,
    and of a single document nothing is held out.
    Raises DataError, with file and line, for what cannot be read: an empty or cut-off file, bytes that are not UTF-8, a
    missing field, an unknown domain, or fewer than two domains.
    """
    path = Path(path)
    if domains is not None:
        domains = check_domains(domains, domains)  # a list, each once; whether they exist comes later
    parts = find_parts(path, loose=by_file)
    collected = _Collector(domains, max_bytes, by_file)
    sizes = [part.path.stat().st_size for part in parts]
    for i, part in enumerate(parts):
        if progress:
            progress(f"reading {part.path.name}", sum(sizes[:i]) / max(1, sum(sizes)))
        collected.read(part)
    if progress:
        progress(f"reading {path.name}", 1.0)
    known = sorted(collected.known)
    chosen = check_domains(domains or (known if by_file else None), known)
    train, heldout = collected.split(chosen)
    return Corpus.build(path.name, chosen, train, heldout)


def source_fingerprint(path: str | Path) -> str:
    """Changes when a file is added, removed or written again (name, size, time of change). Reads no content."""
    digest = hashlib.sha256(str(Path(path).resolve()).encode())
    for part in find_parts(Path(path)):
        state = part.path.stat()
        digest.update(f"\n{part.path} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


class _Collector:
    """Documents by domain, up to a number of bytes."""

    def __init__(self, selected: Sequence[str] | None, max_bytes: int | None, by_file: bool = False) -> None:
        if max_bytes is not None and (isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1):
            raise ConfigError(expected="max_bytes >= 1, or None for all text", got=repr(max_bytes), do="raise it")
        self.selected, self.max_bytes, self.by_file = selected, max_bytes, by_file
        self.known: set[str] = set()
        self.documents: dict[bool | None, dict[str, list[str]]] = {None: {}, False: {}, True: {}}
        self.sizes: dict[tuple[bool, str], int] = {}

    def read(self, part: Part) -> None:
        """Adds the documents of one file; leaves it early when nothing more is wanted from it."""
        held = bool(part.heldout)
        if part.domain is not None:
            self.known.add(part.domain)
            if not self._wants(part.domain, held):
                return
        own_name = re.split(r"\.", part.path.name)[0]
        only_own = True
        unnamed = SHARD.sub("", own_name) if self.by_file else None
        for domain, text, place in part.rows(part.path, unnamed) if part.rows else text_pieces(part):
            self.known.add(domain)
            only_own = only_own and domain in (own_name, unnamed)
            if self._wants(domain, held):
                self._add(domain, text, part.heldout, place)
            elif only_own or part.domain or (self.selected and not any(self._wants(d, held) for d in self.selected)):
                return

    def _wants(self, domain: str, held: bool) -> bool:
        if self.selected is not None and domain not in self.selected:
            return False
        limit = self.max_bytes if not held or self.max_bytes is None else max(1, self.max_bytes // HELDOUT_SHARE)
        return limit is None or self.sizes.get((held, domain), 0) < limit

    def _add(self, domain: str, text: str, heldout: bool | None, place: str) -> None:
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise DataError(expected=f"text that UTF-8 can hold at {place}", got=f"half a character: {error.reason}",
                            do="write the text again from its source, or remove the line") from None  # fmt: skip
        if text.strip():
            self.documents[heldout].setdefault(domain, []).append(text)
            self.sizes[bool(heldout), domain] = self.sizes.get((bool(heldout), domain), 0) + size

    def split(self, chosen: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """(training, held-out) documents. What stands in both is dropped from training, with a warning."""
        train: dict[str, list[str]] = {}
        heldout: dict[str, list[str]] = {}
        dropped = 0
        for domain in chosen:
            rest = self.documents[None].get(domain, []) + self.documents[False].get(domain, [])
            marked = self.documents[True].get(domain)
            heldout[domain] = marked if marked else _hashed_out(rest)
            same = set(heldout[domain])
            train[domain] = [text for text in rest if text not in same]
            dropped += len(rest) - len(train[domain]) if marked else 0
            for name, texts in (("training", train[domain]), ("held-out", heldout[domain])):
                if not texts and not (self.by_file and name == "held-out"):
                    got, do = "no document with text", "give the domain at least two documents, or leave it out"
                    if marked and name == "training":
                        got = "held-out text alone: a file or folder named val, test, dev or heldout is that"
                        do = "rename it, or give text to train on beside it"
                    raise DataError(expected=f"{name} text of the domain {domain!r}", got=got, do=do)
        if dropped:
            warnings.warn(
                f"{dropped} training documents also stand in the held-out part; they are dropped", stacklevel=3
            )
        return train, heldout


def _hashed_out(texts: list[str]) -> list[str]:
    """The documents with the lowest hashes: 5 % of all hashes, and more of a domain whose few documents miss those."""
    least = min(LEAST_HELDOUT_BYTES, 0.02 * sum(len(text.encode()) for text in texts))
    chosen: set[str] = set()
    size = 0
    for fraction, text in sorted((hash_fraction(text), text) for text in set(texts)):
        if (fraction >= HELDOUT_FRACTION and size >= least) or len(chosen) + 1 >= len(set(texts)):
            break
        chosen.add(text)
        size += len(text.encode())
    return [text for text in texts if text in chosen]


def text_pieces(part: Part) -> Iterator[Row]:
    """A text file as documents of at most 20,000 characters, cut at line ends: one book can fill a domain."""
    text = read_text(part.path)
    start = 0
    while start < len(text):
        end = start + LONGEST_DOCUMENT
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield part.domain or "", text[start:end], str(part.path)
        start = end


# ------------------------------------------------------------------------------------------------- finding files


def find_parts(path: Path, *, loose: bool = False) -> list[Part]:
    """The files of a corpus, in a fixed order; ``loose``: also one text file, or a folder of them without domains.

    Raises DataError where there is nothing that can be read.
    """
    if not path.exists():
        raise DataError(expected=f"text at {path}", got="no such file or folder", do=f"pass {ACCEPTED}")
    try:
        if path.is_file():
            parts = [part for part in [_record_part(path)] if part]
        elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            parts = _saved_dataset(path)
        else:
            parts = _record_folder(path) or _text_folder(path)
        if loose and not parts:
            parts = _loose(path)
    except OSError as error:
        raise DataError(expected=f"to read {error.filename or path}", got=error.strerror or str(error),
                        do="check the permissions") from None  # fmt: skip
    if not parts:
        raise DataError(expected=f"text in {path}: {ACCEPTED}", got=_content(path), do="convert it to one of these")
    return parts


def _record_part(path: Path, heldout: bool | None = None) -> Part | None:
    """A file of records, by its suffix, or None. Its name may say that it is held out."""
    name = path.name
    if path.suffix in COMPRESSED:
        name = path.stem
    kind = Path(name).suffix
    rows = {".jsonl": json_rows, ".ndjson": json_rows, ".parquet": parquet_rows}.get(kind)
    if rows is None or (rows is parquet_rows and name != path.name):
        return None
    return Part(path, rows, _split_of(Path(name).stem.split(".")[-1]) if heldout is None else heldout)


def _split_of(name: str) -> bool | None:
    """True for held-out, False for training, None when a name says neither: "val", "test-00000-of-00002", "train"."""
    plain = re.sub(r"-\d+-of-\d+$", "", name.lower())
    return True if plain in HELDOUT_NAMES else False if plain in TRAIN_NAMES else None


def _record_folder(path: Path) -> list[Part]:
    """Record files in a folder, and in its folders named after a split (or `data`)."""
    parts = []
    for entry in _entries(path):
        if entry.is_file():
            parts.append(_record_part(entry))
        elif _split_of(entry.name) is not None or entry.name == "data":
            parts += [_record_part(file, _split_of(entry.name)) for file in _entries(entry) if file.is_file()]
    return [part for part in parts if part]


def _text_folder(path: Path) -> list[Part]:
    """Text files in a folder per domain. Files stand in the order of a hash, so that a cap takes a fair sample."""
    folders = [entry for entry in _entries(path) if entry.is_dir()]
    if folders and all(_split_of(folder.name) is not None for folder in folders):
        pairs = [(inner, _split_of(folder.name)) for folder in folders for inner in _entries(folder) if inner.is_dir()]
    else:
        pairs = [(folder, None) for folder in folders]
    parts = []
    for folder, heldout in pairs:
        files = [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size
                 and not any(name.startswith(".") for name in file.relative_to(folder).parts)]  # fmt: skip
        files.sort(key=lambda file: (hash_fraction(file.relative_to(folder).as_posix()), file))
        parts += [Part(file, None, heldout, folder.name) for file in files]
    return parts


def _loose(path: Path) -> list[Part]:
    """A text file, or those of a folder in the order of a hash, as one domain of its name."""
    files = [path] if path.is_file() else [entry for entry in _entries(path) if entry.is_file()]
    files = [file for file in files if file.suffix not in RECORDS and file.stat().st_size]
    files.sort(key=lambda file: (hash_fraction(file.name), file))
    return [Part(file, None, None, path.stem) for file in files]


def _saved_dataset(path: Path) -> list[Part]:
    """The arrow files of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    if (path / "state.json").is_file():
        return _saved_split(path, None)
    splits = _json(path / "dataset_dict.json", "splits")
    return [part for split in splits for part in _saved_split(path / split, _split_of(split))]


def _saved_split(path: Path, heldout: bool | None) -> list[Part]:
    files = [path / entry["filename"] for entry in _json(path / "state.json", "_data_files")]
    for file in files:
        if not file.is_file():
            raise DataError(expected=f"the dataset's file {file}", got="no such file", do="save the dataset again")
    return [Part(file, arrow_rows, heldout) for file in files]


def _json(path: Path, key: str) -> list:
    try:
        return list(json.loads(path.read_bytes())[key])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(expected=f"the entry {key!r} in {path}", got=f"{type(error).__name__}: {error}",
                        do="save the dataset again with save_to_disk") from None  # fmt: skip


def _entries(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))


def _content(path: Path) -> str:
    if path.is_file():
        return f"a file {path.name}"
    names = [entry.name for entry in _entries(path)]
    return f"{len(names)} entries: {', '.join(names[:5])}" + ", ..." * (len(names) > 5) if names else "an empty folder"
