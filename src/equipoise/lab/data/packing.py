"""From documents to batches: tokens packed into windows of one domain each, cached, and drawn in a fixed order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError, DataError, OutputError, unknown_name
from ...storage.cache import OTHER_CACHE, cache_folder, one_builder
from ...storage.files import atomic_folder, atomic_write, sha256
from .corpus import Corpus, Progress, check_domains, embedded_corpus, embedded_fingerprint
from .installed_text import DOMAINS
from .sources import MAX_BYTES, load_corpus, source_fingerprint
from .tokenizer import (
    END_ID,
    GivenTokenizer,
    bytes_per_id,
    check_vocab_size,
    get_tokenizer,
    load_tokenizer,
    tokenizer_file,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["MIXES", "BatchSampler", "MicroBatch", "PackedData", "describe", "pack", "prepare", "receive", "send"]

FORMAT = 1  # raise it when the packing changes: old caches are then left alone
MAX_HELDOUT_TOKENS = 65_536  # per domain: the mean loss of paired runs is then stable to about 0.01 nats
MOST_COUNTED = 2**24  # tokens of a domain, for the frequencies of ids
MIXES = ("micro_batch", "sequence")
SPLITS = ("train", "heldout")
META, TOKENIZER = "meta.json", "tokenizer.json"
PACKED = ".packed"  # ends the name of a folder that holds packed text with its tokenizer


@dataclass(frozen=True)
class PackedData:
    """Token windows by domain, memory-mapped: (N, S + 1) uint16, uint32 for more than 65536 tokens. A window's last
    token is the next one's first.

    Held-out windows stand in a fixed random order, so the first n are a fair sample. ``heldout_bytes`` are the bytes of
    text that the held-out *targets* (the last S tokens of each window) stand for; the end of text counts as none. With
    a given tokenizer they are the targets' share of the held-out text's bytes.
    """

    domains: list[str]
    corpus_sha256: str
    vocab_size: int  # as asked for; the tokenizer may have fewer when there is little text
    train: dict[str, np.ndarray]
    heldout: dict[str, np.ndarray]
    heldout_bytes: dict[str, int]
    tokenizer_path: Path
    name: str = ""
    folder: Path = Path()  # that holds the files

    @property
    def sequence_length(self) -> int:
        """S: the tokens of a window that are predicted."""
        return self.train[self.domains[0]].shape[1] - 1

    @cached_property
    def frequencies(self) -> np.ndarray:
        """(V,) share of each id in training batches, where domains take turns; of long text in windows evenly apart."""
        shares = []
        for rows in self.train.values():
            taken = rows[:: rows.size // MOST_COUNTED + 1, :-1]
            shares.append(np.bincount(taken.ravel(), minlength=self.vocab_size) / max(taken.size, 1))
        return np.mean(shares, axis=0)


class MicroBatch(NamedTuple):
    tokens_BS: Tensor  # int64 (B, S + 1): inputs are [:, :-1], targets [:, 1:]
    domain_ids_B: Tensor  # int64, places in ``PackedData.domains``


def prepare(
    data: str | Path | None = None,
    *,
    vocab_size: int = 2048,
    sequence_length: int = 256,
    domains: Sequence[str] | None = None,
    max_train_tokens: int | None = None,
    max_heldout_tokens: int | None = MAX_HELDOUT_TOKENS,
    max_bytes: int | None = MAX_BYTES,
    tokenizer: GivenTokenizer | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> PackedData:
    """Text, ready to train on: read, tokenized, packed, and kept in the cache folder for the next time.

    ``data`` is None for the text of this installation, a folder that ``receive`` made, or what ``load_corpus`` reads
    (then at most ``max_bytes`` of training text per domain). ``max_train_tokens`` and ``max_heldout_tokens`` are per
    domain; None is all. ``domains`` empty or None is all. ``tokenizer`` is a given one, instead of one of
    ``vocab_size`` trained on this text. A cached result is checked against its checksums and built again if it is
    damaged.
    Raises ConfigError for sizes that cannot work, DataError for text that cannot be read or a domain with less than one
    window, OutputError when the cache folder cannot be written.
    """
    if tokenizer is None:
        check_vocab_size(vocab_size)
    _check_count("sequence_length", sequence_length)
    for name, value in (("max_train_tokens", max_train_tokens), ("max_heldout_tokens", max_heldout_tokens)):
        if value is not None:
            _check_count(name, value, least=sequence_length + 1)
    folder = cache or cache_folder()
    domains = list(domains) if domains and not isinstance(domains, str) else domains or None
    sizes = [vocab_size, sequence_length, max_train_tokens, max_heldout_tokens]
    sizes = sizes if tokenizer is None else [tokenizer.size, *sizes[1:], tokenizer.sha256, tokenizer.end]

    if data is not None and Path(data).suffix == PACKED:
        return _received(Path(data), sizes, domains)

    def tokenizer_path(corpus_sha256: str) -> Path:
        return tokenizer_file(corpus_sha256, vocab_size, folder) if tokenizer is None else tokenizer.path

    note = folder / "sources" / f"{_key(f'{FORMAT} {_source(data, domains, max_bytes)}')}.json"
    if corpus_sha256 := _remembered(note):
        packed = _open(_packed_folder(folder, corpus_sha256, sizes), tokenizer_path(corpus_sha256))
        if packed:
            return packed
    if data is None:
        corpus = embedded_corpus(domains, progress=progress, cache=folder)
    else:
        corpus = load_corpus(data, domains, max_bytes=max_bytes, progress=progress)
    if tokenizer is None:
        if progress:
            progress("training the tokenizer", 0.0)
        get_tokenizer(corpus, vocab_size, cache=folder)
    target = _packed_folder(folder, corpus.sha256, sizes)
    packed = _packed(target, corpus, tokenizer_path(corpus.sha256), sizes, progress, tokenizer)
    atomic_write(note, json.dumps({"corpus_sha256": corpus.sha256}).encode(), do=OTHER_CACHE)
    return packed


def send(data: PackedData) -> dict[str, bytes]:
    """The files of packed text and its tokenizer, by name: what another machine needs to train on this very text."""
    return {path.name: path.read_bytes() for path in data.folder.iterdir()} | {
        TOKENIZER: data.tokenizer_path.read_bytes()
    }


def receive(files: dict[str, bytes], *, cache: Path | None = None) -> Path:
    """Puts what ``send`` gave into this machine's cache, once, and returns the folder: ``prepare`` takes it as data.

    Raises OutputError when the cache folder cannot be written.
    """
    target = (cache or cache_folder()) / "received" / (hashlib.sha256(files[META]).hexdigest()[:32] + PACKED)
    with one_builder(target):
        if _open(target, target / TOKENIZER) is None:
            with atomic_folder(target, do=OTHER_CACHE) as folder:
                for name, content in files.items():
                    (folder / name).write_bytes(content)
    return target


def _received(folder: Path, sizes: list, domains: Sequence[str] | None) -> PackedData:
    """Raises DataError for files that are damaged, or are not what was asked for."""
    packed = _open(folder, folder / TOKENIZER)
    if packed is None:
        raise DataError(expected=f"packed text in {folder}, as it was sent", got="files that are missing or changed",
                        do="remove the folder; it is sent again")  # fmt: skip
    there = [packed.vocab_size, packed.sequence_length, packed.domains]
    wanted = [sizes[0], sizes[1], domains or packed.domains]
    if there != wanted:
        raise DataError(expected=f"vocabulary, sequence length and domains {wanted}", got=f"{there} in {folder}",
                        do="pass the text itself: packed text has one size")  # fmt: skip
    return packed


def _source(data: str | Path | None, domains: Sequence[str] | None, max_bytes: int | None) -> str:
    """Changes when the same call would find other text."""
    if data is None:
        return f"embedded {embedded_fingerprint(check_domains(domains, DOMAINS))} {domains is not None}"
    return f"{source_fingerprint(data)} {domains} {max_bytes}"


def describe(data: PackedData) -> str:
    """A table of at most 80 columns: tokens by domain, and how many bytes a token stands for."""
    width = 80 - 3 * 16
    lines = [f"{'domain':<{width}}{'train tokens':>16}{'held-out tokens':>16}{'bytes per token':>16}"]
    totals = [0, 0]
    for domain in data.domains:
        counts = [(len(rows) * (rows.shape[1] - 1)) for rows in (data.train[domain], data.heldout[domain])]
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        shown = domain if len(domain) <= width else domain[: width - 1] + "…"
        per_token = data.heldout_bytes[domain] / counts[1]
        lines.append(f"{shown:<{width}}{counts[0]:>16,}{counts[1]:>16,}{per_token:>16.2f}")
    lines.append(f"{'all':<{width}}{totals[0]:>16,}{totals[1]:>16,}")
    lines.append(f"corpus {data.name} sha256 {data.corpus_sha256[:16]}, vocabulary {data.vocab_size},"
                 f" sequences of {data.sequence_length}"[: 80])  # fmt: skip
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- packing


def pack(
    documents: Sequence[str], tokenizer: Tokenizer, sequence_length: int, max_tokens: int | None = None
) -> np.ndarray:
    """(N, S + 1) uint16: the documents, each closed by the end-of-text token, cut every S tokens; the rest falls away.

    Stops at the last window within ``max_tokens`` targets. N is 0 for too little text.
    """
    return _cut(_encoded(documents, tokenizer, END_ID, np.uint16, max_tokens), sequence_length, max_tokens)


def _encoded(
    documents: Sequence[str], tokenizer: Tokenizer, end: int, dtype: type, max_tokens: int | None = None
) -> np.ndarray:
    """The tokens of all documents, or of the first that have more than ``max_tokens`` together."""
    stream: list[np.ndarray] = []
    count = 0
    for start in range(0, len(documents), 32):
        for encoding in tokenizer.encode_batch_fast(list(documents[start : start + 32]), add_special_tokens=False):
            stream.append(np.array([*encoding.ids, end], dtype))
            count += len(stream[-1])
        if max_tokens is not None and count > max_tokens:
            break
    return np.concatenate(stream) if stream else np.empty(0, dtype)


def _cut(tokens: np.ndarray, sequence_length: int, max_tokens: int | None = None) -> np.ndarray:
    windows = max(0, len(tokens) - 1) // sequence_length
    if max_tokens is not None:
        windows = min(windows, max_tokens // sequence_length)
    if not windows:
        return np.empty((0, sequence_length + 1), tokens.dtype)
    starts_N = np.arange(windows) * sequence_length
    return tokens[starts_N[:, None] + np.arange(sequence_length + 1)]


def _packed(target: Path, corpus: Corpus, path: Path, *rest: Any) -> PackedData:
    """What is packed already, else packs it."""
    with one_builder(target):  # else a process may look for the folder just while another replaces it
        packed = _open(target, path)
        if packed is None:
            _write(target, corpus, path, *rest)
            packed = _open(target, path)
    if packed is None:
        raise OutputError(expected=f"the packed text in {target} to read back as written", got="other bytes",
                          do="check the disk, or set EQUIPOISE_CACHE to another folder")  # fmt: skip
    return packed


def _write(
    target: Path,
    corpus: Corpus,
    tokenizer_path: Path,
    sizes: list,
    progress: Progress | None,
    given: GivenTokenizer | None,
) -> None:
    """One .npy file per split and domain, and meta.json with their checksums, which is written last."""
    vocab_size, sequence_length, max_train, max_heldout = sizes[:4]
    tokenizer = load_tokenizer(tokenizer_path, given=given is not None)
    end, dtype = END_ID if given is None else given.end, np.uint16 if vocab_size <= 65_536 else np.uint32
    files: dict[str, str] = {}
    heldout_bytes: dict[str, int] = {}
    with atomic_folder(target, do=OTHER_CACHE) as folder:
        for place, domain in enumerate(corpus.domains):
            if progress:
                progress(f"packing {domain}", place / len(corpus.domains))
            tokens = _encoded(corpus.heldout[domain], tokenizer, end, dtype)
            heldout = _cut(tokens, sequence_length)
            order = np.random.default_rng(0).permutation(len(heldout))
            heldout = heldout[order[: None if max_heldout is None else max_heldout // sequence_length]]
            if given is None:
                heldout_bytes[domain] = int(bytes_per_id(tokenizer)[heldout[:, 1:]].sum())
            else:  # a token may be part of a letter, or a blank that no text has
                per_token = corpus.bytes_of(domain, heldout=True) / max(len(tokens), 1)
                heldout_bytes[domain] = round(per_token * heldout[:, 1:].size)
            tokens = _encoded(corpus.train[domain], tokenizer, end, dtype, max_train)
            train = _cut(tokens, sequence_length, max_train)
            for split, rows in (("train", train), ("heldout", heldout)):
                if not len(rows):
                    raise DataError(expected=f"at least {sequence_length + 1} {split} tokens of the domain {domain!r}",
                                    got=f"text of {corpus.bytes_of(domain, heldout=split == 'heldout')} bytes",
                                    do="give the domain more text, leave it out, or lower sequence_length")  # fmt: skip
                np.save(folder / f"{split}-{place}.npy", rows)
                files[f"{split}-{place}.npy"] = sha256(folder / f"{split}-{place}.npy")
        meta = {"format": FORMAT, "name": corpus.name, "domains": corpus.domains, "corpus_sha256": corpus.sha256,
                "sizes": sizes, "heldout_bytes": heldout_bytes, "files": files,
                "tokenizer": sha256(tokenizer_path)}  # fmt: skip
        (folder / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
    if progress:
        progress("packing", 1.0)


def _open(folder: Path, tokenizer_path: Path) -> PackedData | None:
    """A packed corpus whose files are all there with the right checksums, else None."""
    try:
        meta = json.loads((folder / META).read_bytes())
        files = {folder / name: value for name, value in meta["files"].items()} | {tokenizer_path: meta["tokenizer"]}
        if any(sha256(path) != value for path, value in files.items()):
            return None
        domains = meta["domains"]
        train, heldout = (
            {domain: np.load(folder / f"{split}-{place}.npy", mmap_mode="r") for place, domain in enumerate(domains)}
            for split in SPLITS
        )
        return PackedData(domains, meta["corpus_sha256"], meta["sizes"][0], train, heldout, meta["heldout_bytes"],
                          tokenizer_path, meta["name"], folder)  # fmt: skip
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError):  # missing, cut off or not ours
        return None


def _packed_folder(cache: Path, corpus_sha256: str, sizes: list) -> Path:
    return cache / "packed" / f"{corpus_sha256[:32]}-v{sizes[0]}-s{sizes[1]}-{_key(f'{FORMAT} {sizes}')[:8]}"


def _remembered(note: Path) -> str | None:
    """The checksum of the corpus that a source gave the last time: spares reading the text again."""
    try:
        return str(json.loads(note.read_bytes())["corpus_sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _check_count(name: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(expected=f"a whole number {name} >= {least}", got=f"{name}={value!r}", do=f"raise {name}")


# ------------------------------------------------------------------------------------------------- batches


class BatchSampler:
    """The training batches of every step, a pure function of (seed, step): a resumed run needs no state.

    A step is ``micro_batches`` micro-batches of ``sequences_per_micro_batch`` windows. ``mix="micro_batch"`` gives each
    micro-batch one domain, ``mix="sequence"`` each window its own. Domains take turns, so that over any number of steps
    they differ by at most one turn; inside a step their order is random. A domain's windows come in random order, each
    once before any comes again, in a new order.

    >>> rows = {name: np.arange(30, dtype=np.uint16).reshape(10, 3) for name in ("a", "b")}
    >>> data = PackedData(["a", "b"], "", 300, rows, rows, {}, Path("tokenizer.json"))
    >>> batches = BatchSampler(data, seed=0, sequences_per_micro_batch=2, micro_batches=2)
    >>> [batch.domain_ids_B.tolist() for batch in batches.step(0)]
    [[0, 0], [1, 1]]
    """

    def __init__(self, data: PackedData, *, seed: int, sequences_per_micro_batch: int, micro_batches: int,
                 mix: str = "micro_batch") -> None:  # fmt: skip
        _check_count("seed", seed, least=0)
        _check_count("sequences_per_micro_batch", sequences_per_micro_batch)
        _check_count("micro_batches", micro_batches)
        if mix not in MIXES:
            raise unknown_name("mix", mix, MIXES)
        for domain in data.domains:
            if not len(data.train[domain]):
                raise DataError(expected=f"training text of the domain {domain!r}", got="no whole window",
                                do="give the domain more text, or lower sequence_length")  # fmt: skip
        self.data, self.seed, self.mix = data, seed, mix
        self.sequences_per_micro_batch, self.micro_batches = sequences_per_micro_batch, micro_batches
        self._order = lru_cache(maxsize=2 * len(data.domains))(self._epoch)  # a memory of recent results, not state

    @property
    def tokens_per_step(self) -> int:
        """Predicted tokens in one step: M · B · S."""
        return self.micro_batches * self.sequences_per_micro_batch * self.data.sequence_length

    def step(self, index: int) -> list[MicroBatch]:
        """The micro-batches of step ``index`` (the first is 0)."""
        _check_count("index", index, least=0)
        size, domains = self.sequences_per_micro_batch, len(self.data.domains)
        per_turn = size if self.mix == "micro_batch" else 1  # windows that a domain gives at its turn
        turns = self.micro_batches * size // per_turn
        shuffled = np.random.default_rng([self.seed, 1, index]).permutation(turns) + index * turns
        places = [
            (turn % domains, turn // domains * per_turn + k) for turn in shuffled.tolist() for k in range(per_turn)
        ]
        rows = [self._row(domain, number) for domain, number in places]
        tokens_NS = torch.from_numpy(np.stack(rows).astype(np.int64))
        domain_ids_N = torch.tensor([domain for domain, _ in places])
        return [MicroBatch(*part) for part in zip(tokens_NS.split(size), domain_ids_N.split(size), strict=True)]

    def _row(self, domain: int, number: int) -> np.ndarray:
        """The domain's window at place ``number`` of its endless sequence of epochs."""
        rows = self.data.train[self.data.domains[domain]]
        return rows[self._order(domain, number // len(rows))[number % len(rows)]]

    def _epoch(self, domain: int, epoch: int) -> np.ndarray:
        count = len(self.data.train[self.data.domains[domain]])
        return np.random.default_rng([self.seed, 2, domain, epoch]).permutation(count)
