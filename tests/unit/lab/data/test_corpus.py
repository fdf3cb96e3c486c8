"""The embedded corpus on this very installation: what it is cut from, that nothing leaks, that it never changes."""

from __future__ import annotations

import ast
import io
import json
import random
import re
import subprocess
import sys
import sysconfig
import tokenize
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.errors import DataError, OutputError
from equipoise.lab.data import corpus as corpus_module
from equipoise.lab.data import installed_text as domains_module
from equipoise.lab.data.corpus import Corpus, Deduplicator, check_domains, embedded_corpus, embedded_fingerprint
from equipoise.lab.data.installed_text import (
    DOMAINS,
    Domain,
    Unit,
    bytecode_listing,
    english_paragraphs,
    formulas,
    strip_cpp,
    strip_python,
)

STDLIB = Path(sysconfig.get_path("stdlib"))
MODULES = ["json/decoder.py", "argparse.py", "dataclasses.py", "asyncio/tasks.py", "typing.py", "textwrap.py"]

SMALL = """
import json, sys
from pathlib import Path
from equipoise.lab.data import corpus
corpus.TRAIN_BYTES, corpus.LEAST_DOMAIN_BYTES = 150_000, 100_000
corpus.LEAST_HELDOUT_BYTES = corpus.HELDOUT_BYTES = 20_000
built = corpus.embedded_corpus(cache=Path(sys.argv[1]))
foreign = [name for name in ("sympy", "networkx", "idlelib", "turtle") if name in sys.modules]
print(json.dumps([built.sha256, built.domains, foreign]))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The corpus as a user gets it, but for half the training text, and everything that was said while it was built."""
    cache = tmp_path_factory.mktemp("cache")
    said: list[tuple[str, float]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "TRAIN_BYTES", 1_900_000)
        yield embedded_corpus(cache=cache, progress=lambda what, share: said.append((what, share))), cache, said


def test_every_domain_has_enough_text(built):
    corpus, _, said = built
    assert corpus.domains == list(DOMAINS)
    for domain in corpus.domains:
        assert corpus.bytes_of(domain) + corpus.bytes_of(domain, heldout=True) >= 2_000_000
        assert corpus.bytes_of(domain, heldout=True) >= 150_000
        assert all(200 <= len(text) <= 20_000 for text in corpus.train[domain] + corpus.heldout[domain])
    assert {what.removeprefix("reading ") for what, _ in said} == set(DOMAINS)
    assert all(0 <= share <= 1 for _, share in said)


def test_no_document_comes_twice_and_no_machine_shows(built):
    corpus, _, _ = built
    for domain in corpus.domains:
        plain = ["".join(text.lower().split()) for text in corpus.train[domain] + corpus.heldout[domain]]
        assert len(set(plain)) == len(plain)
        assert not any(re.search(r" at 0x[0-9a-f]{8,}", text) for text in corpus.train[domain])
        assert not any(str(Path(sys.prefix)) in text for text in corpus.train[domain])


def test_the_cache_gives_the_same_corpus_and_a_damaged_one_is_not_believed(built, monkeypatch):
    corpus, cache, _ = built
    monkeypatch.setattr(corpus_module, "_build", lambda *_, **__: pytest.fail("built again"))
    assert embedded_corpus(cache=cache) == corpus
    (file,) = (cache / "corpus").iterdir()
    content = file.read_bytes()
    assert corpus_module._load(file) == corpus
    for damaged in (content[: len(content) // 2], b"", b"not gzip", content[:1000] + b"\0" + content[1001:]):
        file.write_bytes(damaged)
        assert corpus_module._load(file) is None
    file.write_bytes(content)


def test_the_hash_seed_changes_nothing_and_no_module_is_imported(tmp_path):
    """Two processes at once, with other hash seeds: sets and dictionaries of strings come in another order."""
    runs = [
        subprocess.Popen([sys.executable, "-c", SMALL, str(tmp_path / seed)], stdout=subprocess.PIPE, text=True,
                         env={"PYTHONHASHSEED": seed, "PATH": ""})
        for seed in ("1", "2")
    ]  # fmt: skip
    first, second = (json.loads(run.communicate()[0]) for run in runs)
    assert first == second
    assert first[1] == list(DOMAINS)
    assert first[2] == []


def test_splitting_follows_the_file_not_the_text(monkeypatch):
    """All pieces of a file land on one side, whatever the other files are."""
    units = [
        Unit(f"p/{i}.txt", 1, lambda i=i: "\n".join(f"{i} {j} {i * j * 7919}" for j in range(4000))) for i in range(60)
    ]
    sides = {}
    for some in (units, units[::2]):
        train, heldout = corpus_module._fill("x", Domain("", lambda some=some: some, str), None)
        owners = [{text.split(" ", 1)[0] for text in side} for side in (train, heldout)]
        assert not owners[0] & owners[1]
        assert owners[1]
        for side, names in enumerate(owners):
            for name in names:
                sides.setdefault(name, set()).add(side)
    assert any(len(side) == 1 for side in sides.values())


# ------------------------------------------------------------------------------------------------- cutting text out


@pytest.mark.parametrize("name", MODULES)
def test_stripped_python_is_the_same_program(name):
    source = (STDLIB / name).read_text(encoding="utf-8")
    stripped = strip_python(source)
    assert ast.dump(_without_docstrings(stripped)) == ast.dump(_without_docstrings(source))
    comments = [t for t in tokenize.generate_tokens(io.StringIO(stripped).readline) if t.type == tokenize.COMMENT]
    assert comments == []
    assert ast.get_docstring(ast.parse(stripped)) is None


def _without_docstrings(source: str) -> ast.Module:
    """A reference in its own way: drops every statement that is a string, and every `pass`."""

    class Drop(ast.NodeTransformer):
        def visit_Expr(self, node):
            return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node

        def visit_Pass(self, node):
            return None

    return Drop().visit(ast.parse(source))


@pytest.mark.parametrize(
    ("source", "stripped"),
    [
        ("x = '# no comment'  # one", "x = '# no comment'"),
        ("def f():\n    '''doc\n\n    more'''\n", "def f():\n    pass"),
        ("class A:\n    'doc'  # and a comment\n    x = 1", "class A:\n    x = 1"),
        ("def f(): 'doc'", "def f(): 'doc'"),
        ("'doc'; x = 1", "'doc'; x = 1"),
        ("x = 1\n# a\n# b\ny = '''\n# text\n'''", "x = 1\ny = '''\n# text\n'''"),
        ("s = 'ä'  # ö", "s = 'ä'"),
    ],
)
def test_stripped_python_in_small(source, stripped):
    assert strip_python(source) == stripped


@pytest.mark.parametrize(
    ("source", "stripped"),
    [
        ("int a; /* b */ int c;", "int a;   int c;"),
        ('auto s = "/* kept */ // kept";', 'auto s = "/* kept */ // kept";'),
        ("char q = '\"'; // gone", "char q = '\"';"),
        ('auto r = R"x(// kept " )" kept)x"; // gone', 'auto r = R"x(// kept " )" kept)x";'),
        ("int x; // goes on \\\n still a comment\nint y;", "int x;\nint y;"),
        ("long n = 1'000'000; // gone", "long n = 1'000'000;"),
        ("// @generated by a tool\nint x;", ""),
    ],
)
def test_stripped_cpp(source, stripped):
    assert strip_cpp(source) == stripped


def test_bytecode_names_every_instruction_and_sorts_sets():
    source = "def f(x):\n    'doc'\n    return x in {'b', 'a', 'c'}\n"
    listing = bytecode_listing(source)
    assert "{'a', 'b', 'c'}" in listing
    assert "<code f>" in listing
    assert "doc" not in listing
    assert "f (x)" in listing


def test_english_is_prose_only():
    prose = "The first word of this sentence begins a paragraph of plain English."
    source = (
        f'"""{prose}\n\n    >>> f(1, 2, 3) and some words that follow the prompt here\n    3\n\nx : int\n"""\nx = 1\n'
    )
    assert english_paragraphs(source) == prose


def test_formulas_are_the_statements_of_tests():
    asserts = "    assert diff(x**2, x) == 2*x  # rule\n    assert f(x,\n       1) == 1\n"
    source = f"def test_a():\n    x = Symbol('x')\n{asserts}    import os"
    assert formulas(source).split("\n") == ["x = Symbol('x')", "diff(x**2, x) == 2*x", "f(x, 1) == 1"]


# ------------------------------------------------------------------------------------------------- duplicates


@given(st.binary(min_size=64, max_size=300))
def test_window_hashes_are_polynomials_modulo_two_to_the_64(content):
    """Against Python's own integers; only the sampled ones are returned."""
    seen = Deduplicator()
    expected = set()
    for start in range(len(content) - seen.WINDOW + 1):
        value = sum((content[start + i] + 1) * pow(seen._FACTOR, i, 2**64) for i in range(seen.WINDOW)) % 2**64
        value = ((value ^ (value >> 29)) * 0xBF58476D1CE4E5B9) % 2**64
        if value >> (64 - seen.SAMPLE_BITS) == 0:
            expected.add(value)
    assert seen._sample(content) == expected


@given(st.integers(0, 500), st.integers(2000, 4000), st.integers(0, 2**32))
def test_copies_are_found_at_any_offset(shift, length, seed):
    text, other = ("".join(random.Random(s).choices("abcdefghijklmnopqrstuvwxyz", k=length)) for s in (seed, -1 - seed))
    seen = Deduplicator()
    assert seen.is_new(text)
    assert not seen.is_new(other[:shift] + text)
    assert not seen.is_new(text.upper())
    assert seen.is_new(other)


# ------------------------------------------------------------------------------------------------- what can go wrong


def _installation(monkeypatch, **sizes: int) -> None:
    """An installation whose domains hold so many bytes."""

    def units(name: str, size: int) -> list[Unit]:
        rows = lambda i: "\n".join(f"{name}{i}:{j * i * 7919 + j}" for j in range(1000))  # noqa: E731
        return [Unit(f"{name}/{i}", 1, lambda i=i: rows(i)) for i in range(size // 15_000)]

    fake = {name: Domain(f"the {name} files", lambda n=name, s=size: units(n, s), str) for name, size in sizes.items()}
    monkeypatch.setattr(corpus_module, "DOMAINS", fake)


def test_a_domain_that_cannot_be_filled_is_left_out_aloud(monkeypatch, tmp_path):
    _installation(monkeypatch, prose=3_000_000, code=3_000_000, poems=900_000)
    with pytest.warns(UserWarning, match="poems"):
        corpus = embedded_corpus(cache=tmp_path)
    assert corpus.domains == ["prose", "code"]
    with pytest.raises(DataError, match="poems"):
        embedded_corpus(["prose", "poems"], cache=tmp_path)


@pytest.mark.filterwarnings("ignore:this installation")
def test_one_domain_has_to_be_named(monkeypatch, tmp_path):
    _installation(monkeypatch, prose=3_000_000, poems=900_000)
    with pytest.raises(DataError, match="at least two domains"):
        embedded_corpus(cache=tmp_path)
    assert embedded_corpus(["prose"], cache=tmp_path).domains == ["prose"]


def test_a_package_that_is_not_installed_gives_no_files(monkeypatch):
    monkeypatch.setattr(domains_module.importlib.util, "find_spec", lambda name: None)
    assert DOMAINS["symbolic_math"].units() == []
    assert DOMAINS["cpp_headers"].units() == []


@pytest.mark.parametrize(
    ("domains", "said"),
    [
        (["tables", "bytcode"], "did you mean 'bytecode'"),
        ([], "at least two domains"),
        (["tables", "tables"], "every domain once"),
        ("tables", "a list of domains"),
    ],
)
def test_a_selection_that_cannot_work(domains, said, tmp_path):
    with pytest.raises(DataError, match=said):
        embedded_corpus(domains, cache=tmp_path)


def test_a_cache_folder_that_cannot_be_written(monkeypatch, tmp_path):
    _installation(monkeypatch, prose=3_000_000, code=3_000_000)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="EQUIPOISE_CACHE"):
        embedded_corpus(cache=tmp_path / "file" / "cache")


def test_selected_domains_keep_the_order_of_the_selection():
    assert check_domains(["tables", "bytecode"], DOMAINS) == ["tables", "bytecode"]
    assert check_domains(None, ["b", "a"]) == ["b", "a"]


def test_the_fingerprint_follows_the_files(monkeypatch):
    before = embedded_fingerprint()
    assert before == embedded_fingerprint(list(DOMAINS))
    monkeypatch.setattr(domains_module, "LARGEST_FILE", 100_000)
    assert embedded_fingerprint() != before


@given(st.data())
def test_the_checksum_covers_every_boundary(data):
    """Moving a character, a document or a domain to a neighbour gives another checksum."""
    one, two = data.draw(st.text(min_size=1)), data.draw(st.text())
    shapes = [
        (["a", "b"], {"a": [one, two], "b": []}, {"a": [], "b": []}),
        (["a", "b"], {"a": [one + two], "b": []}, {"a": [], "b": []}),
        (["a", "b"], {"a": [one], "b": [two]}, {"a": [], "b": []}),
        (["a", "b"], {"a": [one], "b": []}, {"a": [two], "b": []}),
        (["b", "a"], {"a": [one, two], "b": []}, {"a": [], "b": []}),
    ]
    assert len({Corpus.build("x", *shape).sha256 for shape in shapes}) == len(shapes)
