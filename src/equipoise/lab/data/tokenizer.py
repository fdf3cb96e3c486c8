"""The byte-level BPE tokenizer: trained once per corpus on equally much text of each domain, then cached.

A model that is given as a Hugging Face folder brings its own: `given_tokenizer`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...errors import ConfigError, DataError
from ...storage.cache import OTHER_CACHE, cache_folder
from ...storage.files import atomic_write
from .corpus import Corpus

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["END_ID", "END_OF_TEXT", "GivenTokenizer", "bytes_per_id", "check_vocab_size", "get_tokenizer",
           "given_tokenizer", "load_tokenizer", "tokenizer_file"]  # fmt: skip

END_OF_TEXT, END_ID = "<|endoftext|>", 0  # after every document
SAMPLE_BYTES = 1_000_000  # of each domain, or what the smallest one has
LONGEST_TOKEN = 24  # bytes: keeps rulers of ===== and runs of blanks from taking up the vocabulary


def get_tokenizer(corpus: Corpus, vocab_size: int, *, cache: Path | None = None) -> Tokenizer:
    """The tokenizer of a corpus: 256 bytes, the end of text, and merges up to ``vocab_size`` (fewer for little text).

    Every text has tokens and comes back from them unchanged. Training is deterministic. Cached by the corpus' sha256
    and the size; a damaged file is trained again. Raises ConfigError for a size outside 257 .. 65536.
    """
    check_vocab_size(vocab_size)
    path = tokenizer_file(corpus.sha256, vocab_size, cache)
    if path.is_file():
        try:
            return load_tokenizer(path)
        except DataError:
            pass  # damaged: train it again
    atomic_write(path, _train(corpus, vocab_size).to_str(pretty=True).encode(), do=OTHER_CACHE)
    return load_tokenizer(path)


class GivenTokenizer(NamedTuple):
    """A tokenizer of a Hugging Face folder, copied to the cache."""

    path: Path
    size: int  # one more than its largest id
    end: int  # the id that ends a document
    sha256: str


def given_tokenizer(folder: str | Path, *, cache: Path | None = None) -> GivenTokenizer:
    """The tokenizer in a Hugging Face folder, as text is packed with it: no padding, no truncation, no marks added.

    Raises DataError for a folder without one that can be read, or without a mark that ends a document.
    """
    folder = Path(folder)
    tokenizer = _of_folder(folder)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    text = tokenizer.to_str().encode()
    sha256 = hashlib.sha256(text).hexdigest()
    path = (cache or cache_folder()) / "tokenizers" / f"given-{sha256[:32]}.json"
    if not (path.is_file() and path.read_bytes() == text):
        atomic_write(path, text, do=OTHER_CACHE)
    end = next(_ends(folder, tokenizer), None)
    if end is None:
        raise DataError(
            expected=f"a token that ends a document: eos_token in {folder}/tokenizer_config.json, or eos_token_id",
            got="none that the tokenizer has",
            do="name one in tokenizer_config.json",
        )
    return GivenTokenizer(path, max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1, end, sha256)


def load_tokenizer(path: str | Path, *, given: bool = False) -> Tokenizer:
    """A tokenizer file that ``get_tokenizer`` (or ``given_tokenizer``) wrote.

    Raises DataError when it is missing, damaged or another kind.
    """
    library = _library()
    try:
        tokenizer = library.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise DataError(expected=f"a tokenizer at {path}", got=str(error)[:120],
                        do="remove the file: it is built again") from None  # fmt: skip
    if not given and tokenizer.token_to_id(END_OF_TEXT) is None:
        raise DataError(expected=f"a tokenizer with {END_OF_TEXT} at {path}", got="no such token", do="remove the file")
    tokenizer.encode_special_tokens = True  # a document that spells the mark out gets its letters, not the mark
    return tokenizer


def tokenizer_file(corpus_sha256: str, vocab_size: int, cache: Path | None = None) -> Path:
    """Where the tokenizer of a corpus is kept."""
    return (cache or cache_folder()) / "tokenizers" / f"{corpus_sha256[:32]}-v{vocab_size}.json"


def bytes_per_id(tokenizer: Tokenizer) -> np.ndarray:
    """(V,) how many bytes of text each token stands for; the end of text stands for none."""
    sizes = np.zeros(tokenizer.get_vocab_size(), np.int64)
    for token, place in tokenizer.get_vocab().items():
        sizes[place] = 0 if token == END_OF_TEXT else len(token)  # in a byte-level vocabulary one character is one byte
    return sizes


def check_vocab_size(vocab_size: int) -> None:
    """Raises ConfigError unless the size holds all bytes and fits 16 bits."""
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 257 <= vocab_size <= 65_536:
        raise ConfigError(expected="a vocabulary of 257 (256 bytes and the end of text) to 65536 (16 bits) tokens",
                          got=f"vocab_size={vocab_size!r}", do="choose a size in this range")  # fmt: skip


def _of_folder(folder: Path) -> Tokenizer:
    """From tokenizer.json, else as transformers makes it of an older folder's files."""
    path = folder / "tokenizer.json"
    if path.is_file():
        return load_tokenizer(path, given=True)
    if any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model")):
        from transformers import AutoTokenizer

        try:
            made = AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
        except Exception as error:  # of many kinds, by the file and the class
            raise DataError(
                expected=f"a tokenizer in {folder}",
                got=str(error).partition("\n")[0][:200],
                do="save it again with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
            ) from None
        return made
    raise DataError(
        expected=f"a tokenizer beside the model: {path}",
        got="none",
        do="copy tokenizer.json and tokenizer_config.json there, from where the model is from; the text is cut with it",
    )


def _ends(folder: Path, tokenizer: Tokenizer) -> Iterator[int]:
    """The end-of-text ids that the folder's files name, the tokenizer's own first."""
    token = _json(folder / "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str) and (found := tokenizer.token_to_id(token)) is not None:
        yield found
    for name in ("generation_config.json", "config.json"):
        ids = _json(folder / name).get("eos_token_id")
        for one in ids if isinstance(ids, list) else [ids]:
            if isinstance(one, int) and tokenizer.id_to_token(one) is not None:
                yield one


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _train(corpus: Corpus, vocab_size: int) -> Tokenizer:
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=LONGEST_TOKEN,
        show_progress=False,
    )
    size = min(SAMPLE_BYTES, *(corpus.bytes_of(domain) for domain in corpus.domains))
    sample = [text for domain in corpus.domains for text in _sample(corpus.train[domain], size)]
    tokenizer.train_from_iterator(sample, trainer, length=len(sample))
    return tokenizer


def _sample(documents: list[str], size: int) -> list[str]:
    """At most ``size`` bytes: whole documents, evenly spread, the last one cut."""
    total = sum(len(text.encode()) for text in documents)
    taken = []
    for text in documents[:: max(1, total // size)]:
        piece = text.encode()[:size].decode(errors="ignore")
        taken.append(piece)
        size -= len(piece.encode())
        if size <= 0:
            break
    return taken


def _library():
    try:
        import tokenizers
    except ImportError:
        raise ConfigError(expected="the package tokenizers", got="it is not installed",
                          do="pip install 'equipoise[lab]'") from None  # fmt: skip
    return tokenizers
