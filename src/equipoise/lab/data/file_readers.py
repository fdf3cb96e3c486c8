"""Reads records and text from files, plain or compressed; errors name file and line."""

from __future__ import annotations

import gzip
import importlib
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ...errors import DataError

__all__ = ["arrow_rows", "json_rows", "parquet_rows", "read_text"]

CHUNK = 1 << 20
FIELDS = ("text", "domain")
Row = tuple[str, str, str]  # domain, text, the place it stands in ("file:line")


def json_rows(path: Path, domain: str | None = None) -> Iterator[Row]:
    """The records of a file with one JSON object a line. Blank lines are skipped.

    ``domain``, here and below: that of records which name none; None: each has to.
    """
    found = False
    for number, line, whole in _lines(path):
        if not line.strip():
            continue
        found = True
        place = f"{path}:{number}"
        try:
            record = json.loads(_decode(line, place))
        except json.JSONDecodeError as error:
            cut = "the file ends inside this line" if not whole else f"{error.msg} at column {error.colno}"
            raise DataError(expected=f"a JSON object at {place}", got=cut,
                            do="write the file again: it seems cut off" if not whole else "remove this line",
                            ) from None  # fmt: skip
        if not isinstance(record, dict):
            raise DataError(expected=f'an object with "text" and "domain" at {place}', got=f"a {type(record).__name__}",
                            do='write {"text": "...", "domain": "..."} on each line')  # fmt: skip
        yield _row(record, place, domain)
    if not found:
        raise _empty(path)


def parquet_rows(path: Path, domain: str | None = None) -> Iterator[Row]:
    """The rows of a parquet file with the columns text and domain."""
    _not_empty(path)
    parquet = _pyarrow("pyarrow.parquet", path)
    with _arrow_errors(path), parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        names = _columns(schema, path, domain)
        yield from _batches(file.iter_batches(batch_size=256, columns=names), schema, path, domain)


def arrow_rows(path: Path, domain: str | None = None) -> Iterator[Row]:
    """The rows of one data file of a saved Hugging Face dataset (an arrow stream)."""
    _not_empty(path)
    arrow = _pyarrow("pyarrow", path)
    with _arrow_errors(path), arrow.memory_map(str(path)) as source, arrow.ipc.open_stream(source) as stream:
        _columns(stream.schema, path, domain)
        yield from _batches(stream, stream.schema, path, domain)


def read_text(path: Path) -> str:
    """A text file, plain or compressed. Line ends become a line feed."""
    content = b"".join(_chunks(path))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"{path}:{content.count(10, 0, error.start) + 1}"
        text = _decode(content, place)  # raises with this place
    return text.replace("\r\n", "\n")


# ------------------------------------------------------------------------------------------------- bytes


def _chunks(path: Path) -> Iterator[bytes]:
    _not_empty(path)
    try:
        with open(path, "rb") as raw:
            if path.suffix == ".zst":
                yield from _zstd_chunks(raw, path)
                return
            file: Any = raw
            if path.suffix == ".gz":
                file = gzip.open(raw)
            elif path.suffix == ".xz":
                file = lzma.open(raw)
            while chunk := file.read(CHUNK):
                yield chunk
    except EOFError:
        raise DataError(expected=f"a whole file {path}", got=f"{path.stat().st_size} bytes that end too early",
                        do="copy or compress the file again: it is cut off") from None  # fmt: skip
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise DataError(expected=f"{path.suffix} data in {path}", got=f"damaged or other data ({error})",
                        do="copy or compress the file again") from None  # fmt: skip
    except OSError as error:
        raise DataError(expected=f"to read {path}", got=error.strerror or str(error), do="check the file") from None


def _zstd_chunks(raw: IO[bytes], path: Path) -> Iterator[bytes]:
    """Frame by frame: zstandard's own reader takes the end of a cut-off file for the end of the data."""
    try:
        import zstandard
    except ImportError:
        raise _missing_package("zstandard", path) from None
    decoder = None
    while chunk := raw.read(CHUNK):
        while chunk:
            if decoder is None or decoder.eof:
                decoder = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                plain = decoder.decompress(chunk)
            except zstandard.ZstdError as error:
                raise DataError(expected=f".zst data in {path}", got=f"damaged or other data ({error})",
                                do="copy or compress the file again") from None  # fmt: skip
            chunk = decoder.unused_data if decoder.eof else b""
            if plain:
                yield plain
    if decoder is None or not decoder.eof:
        raise EOFError


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """(line number from 1, its bytes, whether a line feed ended it)."""
    number, rest = 1, [b""]
    for chunk in _chunks(path):
        first, *more = chunk.split(b"\n")
        rest.append(first)
        for piece in more:
            line = b"".join(rest)
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, True
            number, rest = number + 1, [piece]
    if line := b"".join(rest):
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, False


def _decode(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(expected=f"UTF-8 text at {place}", got=f"byte 0x{content[error.start]:02x} ({error.reason})",
                        do="convert it, for example: iconv -f latin1 -t utf-8 FILE") from None  # fmt: skip


# ------------------------------------------------------------------------------------------------- records


def _row(record: dict[str, Any], place: str, domain: str | None = None) -> Row:
    if domain is not None and "domain" not in record:
        record = record | {"domain": domain}
    for name in FIELDS:
        value = record.get(name)
        if not isinstance(value, str) or (name == "domain" and not value.strip()):
            got = f"fields {', '.join(map(str, record))}" if name not in record else f"{name} = {str(value)[:40]!r}"
            raise DataError(expected=f'a string in the field "{name}" at {place}', got=got or "an empty object",
                            do=f'give every record a "{name}"')  # fmt: skip
    return record["domain"], record["text"], place


def _batches(batches: Any, schema: Any, path: Path, own: str | None = None) -> Iterator[Row]:
    labels = _label_names(schema)
    number = 0
    for batch in batches:
        texts = batch.column("text").to_pylist()
        domains = batch.column("domain").to_pylist() if "domain" in schema.names else [own] * len(texts)
        for text, domain in zip(texts, domains, strict=True):
            number += 1
            if isinstance(domain, int) and 0 <= domain < len(labels):
                domain = labels[domain]
            yield _row({"text": text, "domain": domain}, f"{path}, row {number}")
    if not number:
        raise _empty(path)


def _label_names(schema: Any) -> list[str]:
    """The names behind the numbers of a `ClassLabel` column, as Hugging Face stores them in the file."""
    try:
        return list(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]["domain"]["names"])
    except (KeyError, ValueError, TypeError):
        return []


def _columns(schema: Any, path: Path, domain: str | None) -> list[str]:
    """Those of text and domain that are there. Raises DataError for one that is missing and needed."""
    for name in FIELDS if domain is None else FIELDS[:1]:
        if name not in schema.names:
            raise DataError(expected=f"the columns text and domain in {path}", got=f"columns {', '.join(schema.names)}",
                            do=f"add or rename a column to {name!r}")  # fmt: skip
    return [name for name in FIELDS if name in schema.names]


@contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    """Turns pyarrow's errors (all are ValueError, OSError or KeyError) into one that names the file."""
    try:
        yield
    except DataError:
        raise
    except (ValueError, OSError, KeyError) as error:
        raise DataError(expected=f"a whole data file {path}", got=str(error).split("\n")[0][:120],
                        do="write it again: it is damaged, cut off or of another kind") from None  # fmt: skip


def _pyarrow(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise _missing_package("pyarrow", path) from None


def _missing_package(package: str, path: Path) -> DataError:
    return DataError(expected=f"the package {package}, to read {path.name}", got="it is not installed",
                     do="pip install 'equipoise[lab]'")  # fmt: skip


def _not_empty(path: Path) -> None:
    try:
        if path.stat().st_size == 0:
            raise _empty(path)
    except OSError as error:
        raise DataError(expected=f"to read {path}", got=error.strerror or str(error), do="check the file") from None


def _empty(path: Path) -> DataError:
    return DataError(expected=f"text in {path}", got="an empty file", do="remove it, or write it again")
