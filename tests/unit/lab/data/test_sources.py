"""A user's own text: every form gives the same documents, every defect an error that names file and line."""

from __future__ import annotations

import gzip
import json
import lzma
import random
from pathlib import Path

import pytest

from equipoise.errors import ConfigError, DataError
from equipoise.lab.data.corpus import Corpus
from equipoise.lab.data.sources import load_corpus, source_fingerprint

zstandard = pytest.importorskip("zstandard")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

RNG = random.Random(1)
DOCUMENTS = {
    domain: [f"{domain} {i} " + "".join(RNG.choices(letters, k=900)) for i in range(80)]
    for domain, letters in {"deutsch": "abcdäöüß ", "中文": "中文字符。\n", "c": "{}();=+ ij\t\n"}.items()
}
RECORDS = [{"text": text, "domain": domain} for domain, texts in DOCUMENTS.items() for text in texts]
PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: zstandard.compress(content[:999]) + zstandard.compress(content[999:]),  # two frames
}


def as_lines(records: list, end: str = "\n") -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + end for record in records).encode()


def all_of(corpus: Corpus) -> dict[str, set[str]]:
    for domain in corpus.domains:
        assert not set(corpus.train[domain]) & set(corpus.heldout[domain])
        assert corpus.train[domain]
        assert corpus.heldout[domain]
    return {domain: {*corpus.train[domain], *corpus.heldout[domain]} for domain in corpus.domains}


WHOLE = {domain: set(texts) for domain, texts in DOCUMENTS.items()}


# ------------------------------------------------------------------------------------------------- every form


@pytest.mark.parametrize("suffix", PACKERS)
def test_json_lines(tmp_path, suffix):
    plain = load_corpus(_write(tmp_path / "plain.jsonl", as_lines(RECORDS)))
    path = _write(tmp_path / f"my.jsonl{suffix}", PACKERS[suffix](b"\xef\xbb\xbf" + as_lines(RECORDS, "\r\n\n")))
    corpus = load_corpus(path)
    assert all_of(corpus) == WHOLE
    assert corpus.domains == sorted(WHOLE)
    assert (corpus.train, corpus.heldout, corpus.sha256) == (plain.train, plain.heldout, plain.sha256)


def test_parquet(tmp_path):
    table = pyarrow.Table.from_pylist(RECORDS).append_column("more", pyarrow.array([1] * len(RECORDS)))
    parquet.write_table(table, tmp_path / "my.parquet", row_group_size=50)
    assert all_of(load_corpus(tmp_path / "my.parquet")) == WHOLE


def test_files_marked_as_held_out(tmp_path):
    """One folder, three forms; the names say which part is held out."""
    by_domain = {domain: [r for r in RECORDS if r["domain"] == domain] for domain in WHOLE}
    _write(tmp_path / "deutsch.train.jsonl.xz", lzma.compress(as_lines(by_domain["deutsch"][:70])))
    _write(tmp_path / "deutsch.val.jsonl.xz", lzma.compress(as_lines(by_domain["deutsch"][70:])))
    parquet.write_table(pyarrow.Table.from_pylist(by_domain["中文"][:70]), tmp_path / "train-00000-of-00001.parquet")
    parquet.write_table(
        pyarrow.Table.from_pylist(by_domain["中文"][70:]), tmp_path / "validation-00000-of-00001.parquet"
    )
    (tmp_path / "test").mkdir()
    _write(tmp_path / "test" / "a.jsonl", as_lines(by_domain["c"][70:]))
    _write(tmp_path / "rest.jsonl.zst", zstandard.compress(as_lines(by_domain["c"][:70])))
    corpus = load_corpus(tmp_path)
    for domain, texts in DOCUMENTS.items():
        assert corpus.train[domain] == texts[:70]
        assert corpus.heldout[domain] == texts[70:]


def test_a_file_that_is_held_out_by_its_name_says_so(tmp_path):
    _write(tmp_path / "val.jsonl", as_lines(RECORDS))
    with pytest.raises(DataError, match=r"(?s)held-out text alone: a file or folder named val.*do: .*rename it"):
        load_corpus(tmp_path / "val.jsonl")


def test_a_folder_of_text_per_domain(tmp_path):
    for domain, texts in DOCUMENTS.items():
        (tmp_path / domain / "deep").mkdir(parents=True)
        for i, text in enumerate(texts):
            _write(tmp_path / domain / "deep" / f"{i}.txt", text.encode())
        _write(tmp_path / domain / ".hidden", b"\xff")
        _write(tmp_path / domain / "empty.txt", b"")
    _write(tmp_path / "c" / "deep" / "0.txt", b"")
    _write(tmp_path / "c" / "0.txt.gz", gzip.compress(DOCUMENTS["c"][0].encode()))
    corpus = load_corpus(tmp_path)
    assert all_of(corpus) == WHOLE


def test_folders_named_after_splits(tmp_path):
    for split, part in (("train", slice(0, 70)), ("val", slice(70, 80))):
        for domain, texts in DOCUMENTS.items():
            (tmp_path / split / domain).mkdir(parents=True)
            for i, text in enumerate(texts[part]):
                _write(tmp_path / split / domain / f"{i}.txt", text.encode())
    corpus = load_corpus(tmp_path)
    for domain, texts in DOCUMENTS.items():
        assert set(corpus.train[domain]) == set(texts[:70])
        assert set(corpus.heldout[domain]) == set(texts[70:])


def test_one_long_book_fills_a_domain(tmp_path):
    book = "\n".join(f"line {i} of a long book {i * i}" for i in range(20_000))
    for domain in ("a", "b"):
        (tmp_path / domain).mkdir()
        _write(tmp_path / domain / "book.txt", book.replace("line", domain).encode())
    corpus = load_corpus(tmp_path)
    pieces = corpus.train["a"] + corpus.heldout["a"]
    assert len(pieces) > 20
    assert all(len(piece) <= 20_000 and piece.endswith("\n") for piece in pieces if not book.endswith(piece[-9:]))
    assert sum(map(len, pieces)) == len(book.replace("line", "a"))


@pytest.mark.filterwarnings("ignore")
def test_a_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    names = sorted(WHOLE)
    features = datasets.Features({"text": datasets.Value("string"), "domain": datasets.ClassLabel(names=names)})
    rows = [{"text": r["text"], "domain": names.index(r["domain"])} for r in RECORDS]
    whole = datasets.Dataset.from_list(rows, features=features)
    whole.save_to_disk(str(tmp_path / "one"), num_shards=2)
    assert all_of(load_corpus(tmp_path / "one")) == WHOLE

    parts = whole.train_test_split(test_size=0.2, seed=0)
    datasets.DatasetDict({"train": parts["train"], "validation": parts["test"]}).save_to_disk(str(tmp_path / "two"))
    corpus = load_corpus(tmp_path / "two")
    assert all_of(corpus) == WHOLE
    held = {text for texts in corpus.heldout.values() for text in texts}
    assert held == set(parts["test"]["text"])

    (file,) = (tmp_path / "two" / "train").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(DataError, match=r"data-00000.*arrow"):
        load_corpus(tmp_path / "two")
    file.unlink()
    with pytest.raises(DataError, match="no such file"):
        load_corpus(tmp_path / "two")


# ------------------------------------------------------------------------------------------------- how much is read


def test_selection_and_cap(tmp_path):
    path = _write(tmp_path / "my.jsonl", as_lines(RECORDS))
    corpus = load_corpus(path, ["中文", "c"])
    assert corpus.domains == ["中文", "c"]
    assert all_of(corpus) == {domain: WHOLE[domain] for domain in ("中文", "c")}
    for domain, documents in all_of(load_corpus(path, max_bytes=10_000)).items():
        sizes = [len(text.encode()) for text in documents]
        assert 10_000 <= sum(sizes) < 10_000 + max(sizes)
        assert documents == set(DOCUMENTS[domain][: len(documents)])
    assert load_corpus(path, max_bytes=None).sha256 == load_corpus(path).sha256


def test_reading_stops_where_nothing_more_is_wanted(tmp_path):
    """Behind the cap stands what could not be read: a file named after its domain is left when that is full."""
    for domain, texts in DOCUMENTS.items():
        lines = as_lines([{"text": text, "domain": domain} for text in texts])
        _write(tmp_path / f"{domain}.train.jsonl", lines + b"not json\n")
    assert set(load_corpus(tmp_path, max_bytes=20_000).domains) == set(WHOLE)
    with pytest.raises(DataError, match="jsonl:81"):
        load_corpus(tmp_path)
    _write(tmp_path / "c.train.jsonl", as_lines([RECORDS[-1]]) + b"not json\n")
    assert load_corpus(tmp_path, ["deutsch", "中文"], max_bytes=20_000).domains == ["deutsch", "中文"]  # c is not read


def test_the_split_depends_on_the_document_alone(tmp_path):
    many = [{"text": f"{d} {i} {i * 7919}", "domain": d} for d in "ab" for i in range(3000)]
    first = load_corpus(_write(tmp_path / "1.jsonl", as_lines(many)))
    second = load_corpus(_write(tmp_path / "2.jsonl", as_lines(many[::-1][::2])))
    for domain in "ab":
        assert 0.03 < len(first.heldout[domain]) / 3000 < 0.07
        assert set(second.heldout[domain]) <= set(first.heldout[domain])
        assert set(second.train[domain]) <= set(first.train[domain])


def test_training_text_that_is_held_out_too_is_dropped_aloud(tmp_path):
    _write(tmp_path / "a.train.jsonl", as_lines(RECORDS))
    _write(tmp_path / "a.val.jsonl", as_lines([r for r in RECORDS if r["text"].split()[1] in ("3", "4")]))
    with pytest.warns(UserWarning, match="6 training documents"):
        corpus = load_corpus(tmp_path)
    assert all_of(corpus) == WHOLE


def test_the_fingerprint_follows_the_files(tmp_path):
    path = _write(tmp_path / "a.jsonl", as_lines(RECORDS))
    before = source_fingerprint(tmp_path)
    assert before == source_fingerprint(tmp_path)
    _write(path, as_lines(RECORDS[:-1]))
    after = source_fingerprint(tmp_path)
    _write(tmp_path / "b.jsonl", as_lines(RECORDS))
    assert len({before, after, source_fingerprint(tmp_path)}) == 3


# ------------------------------------------------------------------------------------------------- what can go wrong

GOOD = as_lines(RECORDS[:3])
BAD_LINES = {
    "no text": (b'{"domain": "a"}\n', 'field "text"'),
    "no domain": (b'{"text": "x", "lang": "de"}\n', 'field "domain"'),
    "empty domain": (b'{"text": "x", "domain": " "}\n', 'field "domain"'),
    "a number": (b'{"text": 5, "domain": "a"}\n', "text = '5'"),
    "null": (b'{"text": null, "domain": "a"}\n', 'field "text"'),
    "a list": (b'["x"]\n', "a list"),
    "not JSON": (b"{text: x}\n", "column 2"),
    "cut off": (b'{"text": "x", "dom', "ends inside this line"),
    "latin 1": ('{"text": "für", "domain": "a"}\n'.encode("latin1"), "byte 0xfc"),
    "half a surrogate": (b'{"text": "\\ud800", "domain": "a"}\n', "half a character"),
}


@pytest.mark.parametrize("defect", BAD_LINES)
@pytest.mark.parametrize("suffix", PACKERS)
def test_a_bad_line_is_named(tmp_path, defect, suffix):
    line, said = BAD_LINES[defect]
    path = _write(tmp_path / f"bad.jsonl{suffix}", PACKERS[suffix](GOOD + line))
    with pytest.raises(DataError) as error:
        load_corpus(path)
    assert f"{path}:4" in str(error.value)
    assert said in str(error.value)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("left", [0.3, 0.999])
def test_a_compressed_file_that_is_cut_off(tmp_path, suffix, left):
    content = PACKERS[suffix](as_lines(RECORDS))
    path = _write(tmp_path / f"cut.jsonl{suffix}", content[: int(len(content) * left)])
    with pytest.raises(DataError, match="cut off"):
        load_corpus(path)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_compressed_file_that_is_none(tmp_path, suffix):
    with pytest.raises(DataError, match=f"expected {suffix} data"):
        load_corpus(_write(tmp_path / f"x.jsonl{suffix}", as_lines(RECORDS)))
    content = bytearray(PACKERS[suffix](as_lines(RECORDS)))
    content[len(content) // 2 : len(content) // 2 + 40] = b"\xff" * 40
    with pytest.raises(DataError, match=f"x.jsonl{suffix}"):
        load_corpus(_write(tmp_path / f"x.jsonl{suffix}", bytes(content)))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
@pytest.mark.parametrize("name", ["e.jsonl", "e.jsonl.gz", "e.jsonl.xz", "e.jsonl.zst", "e.parquet"])
def test_an_empty_file(tmp_path, name, content):
    if name.endswith(".parquet"):
        if content:
            parquet.write_table(pyarrow.Table.from_pylist(RECORDS[:1]).slice(0, 0), tmp_path / name)
    else:
        _write(tmp_path / name, PACKERS[Path(name).suffix.replace(".jsonl", "")](content) if content else b"")
    if not content:
        _write(tmp_path / name, b"")
    with pytest.raises(DataError, match=f"{name}\n  got: an empty file"):
        load_corpus(tmp_path / name)


def test_parquet_that_cannot_be_read(tmp_path):
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"text": "x", "kind": "a"}]), path)
    with pytest.raises(DataError, match="columns text, kind"):
        load_corpus(path)
    parquet.write_table(pyarrow.Table.from_pylist([*RECORDS[:2], {"text": None, "domain": "c"}]), path)
    with pytest.raises(DataError, match="row 3"):
        load_corpus(path)
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    _write(path, path.read_bytes()[:-300])
    with pytest.raises(DataError, match=r"x\.parquet"):
        load_corpus(path)


def test_text_files_that_are_no_text(tmp_path):
    for domain in "ab":
        (tmp_path / domain).mkdir()
        _write(tmp_path / domain / "x.txt", b"one\ntwo\n\xffthree")
    with pytest.raises(DataError, match=r"x\.txt:3"):
        load_corpus(tmp_path)


def test_nothing_to_read(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_corpus(tmp_path / "absent.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="an empty folder"):
        load_corpus(tmp_path / "folder")
    _write(tmp_path / "folder" / "notes.pdf", b"x")
    with pytest.raises(DataError, match=r"notes\.pdf"):
        load_corpus(tmp_path / "folder")
    with pytest.raises(DataError, match=r"notes\.pdf"):
        load_corpus(tmp_path / "folder" / "notes.pdf")


def test_domains_that_cannot_work(tmp_path):
    path = _write(tmp_path / "my.jsonl", as_lines(RECORDS))
    with pytest.raises(DataError, match="did you mean 'deutsch'"):
        load_corpus(path, ["deutsh", "c"])
    assert load_corpus(path, ["c"]).domains == ["c"]
    with pytest.raises(DataError, match="at least two domains"):
        load_corpus(_write(tmp_path / "one.jsonl", as_lines(RECORDS[:50])))
    with pytest.raises(DataError, match="held-out text of the domain 'c'"):
        load_corpus(_write(tmp_path / "few.jsonl", as_lines([*RECORDS[:90], RECORDS[-1]])))
    with pytest.raises(ConfigError, match="max_bytes"):
        load_corpus(path, max_bytes=0)


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
