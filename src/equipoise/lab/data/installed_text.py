"""The six domains of the embedded corpus: which installed files feed each, and how their text is cut out.

All of it is in every installation that has torch and numpy: Python's standard library, torch with its C++ headers,
numpy, and the two packages that torch itself requires (sympy, networkx). Modules are read as text and never imported.
Python is taken apart with ``ast`` and ``tokenize``: a regular expression cannot tell a comment from a string.
"""

from __future__ import annotations

import ast
import dis
import importlib.util
import io
import os
import re
import sysconfig
import tokenize
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

__all__ = ["DOMAINS", "Domain", "Unit", "bytecode_listing", "english_paragraphs", "formulas", "strip_cpp",
           "strip_python"]  # fmt: skip

# Left out everywhere: caches, what pip adds, and parts that distributions drop or generate on the build machine.
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "lib-dynload", "test", "tests", "testing",
                   "idle_test", "lib2to3", "encodings", "pydoc_data", "ensurepip", "serialized_patterns"}  # fmt: skip
SKIPPED_FILES = re.compile(r"_sysconfigdata|sitecustomize|usercustomize|__config__\.py|version\.py")
_BLANK_LINES = re.compile(r"\n[ \t]*\n")
_TRIPLE_QUOTED = re.compile(r'"""(.*?)"""', re.DOTALL)
_NO_LETTER = re.compile(r"[^\w ]|[\d_]")
LARGEST_FILE = 150_000  # bytes; larger ones are mostly generated, and slow to take apart
LONGEST_LINE = 1_000  # characters; longer ones are data, not text


@dataclass(frozen=True)
class Unit:
    """A file, or a block of a generated table: what goes as a whole into training or into the held-out part."""

    name: str  # "stdlib/json/decoder.py": the same on every machine
    size: int  # bytes; part of the fingerprint
    read: Callable[[], str]


@dataclass(frozen=True)
class Domain:
    """One kind of text. ``units`` lists where it comes from; ``extract`` turns a unit's text into the domain's text."""

    about: str
    units: Callable[[], list[Unit]]
    extract: Callable[[str], str]


def _root(package: str) -> Path | None:
    """The folder of a package, without importing it. ``stdlib`` is Python's own library."""
    if package == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else None


def _files(package: str, suffixes: tuple[str, ...], *, under: str = "", skipped: Iterable[str] = ()) -> Iterator[Unit]:
    """The files of a package, sorted by name. A package that is not installed has none."""
    root = _root(package)
    skipped = set(skipped)
    if root is None:
        return
    for folder, names, files in os.walk(root / under):
        names[:] = sorted(name for name in names if name not in skipped and not name.startswith("config-"))
        for name in sorted(files):
            if name.endswith(suffixes) and not SKIPPED_FILES.search(name):
                path = Path(folder, name)
                size = path.stat().st_size
                if 0 < size <= LARGEST_FILE:
                    yield Unit(f"{package}/{path.relative_to(root).as_posix()}", size, _reader(path))


def _reader(path: Path) -> Callable[[], str]:
    return lambda: path.read_bytes().decode("utf-8").replace("\r\n", "\n")


def _python_files(*packages: str) -> list[Unit]:
    return [unit for package in packages for unit in _files(package, (".py",), skipped=SKIPPED_FOLDERS)]


def _cpp_files() -> list[Unit]:
    return list(_files("torch", (".h", ".hpp", ".cuh"), under="include", skipped={"ops"}))


def _sympy_tests() -> list[Unit]:
    return [unit for unit in _files("sympy", (".py",)) if "/tests/" in unit.name]


def _tables() -> list[Unit]:
    blocks = [Unit(f"unicode-{unicodedata.unidata_version}/{start:06X}", 256, lambda start=start: _unicode_rows(start))
              for start in range(0, 0x20000, 256)]  # fmt: skip
    return [*blocks, *_files("numpy", (".csv",))]


# ------------------------------------------------------------------------------------------------- Python


def _docstrings(tree: ast.Module) -> Iterator[tuple[ast.Expr, str, list[ast.stmt]]]:
    """Every statement that is only a string: itself, its text, the body it stands in. Walks no expressions (speed)."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        for part in ("body", "orelse", "finalbody", "handlers", "cases"):
            inner: list[ast.stmt] = getattr(node, part, [])
            waiting += inner
            for statement in inner:
                match statement:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        yield statement, text, inner


def strip_python(source: str) -> str:
    """Python source without comments and docstrings, in its own layout.

    >>> print(strip_python('def f(x):  # twice' + chr(10) + '    "The doc."' + chr(10) + '    return 2 * x'))
    def f(x):
        return 2 * x
    """
    lines = source.split("\n")
    removed: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
            if not lines[row - 1]:
                removed.add(row - 1)
    for node, _, body in _docstrings(ast.parse(source)):
        first, last = node.lineno - 1, node.end_lineno or node.lineno
        indent = lines[first][: node.col_offset]
        if indent.strip() or any(other is not node and first + 1 <= other.lineno <= last for other in body):
            continue  # `def f(): "doc"` and `"doc"; x = 1` stay as they are
        removed.update(range(first, last))
        if len(body) == 1:  # a function needs a body
            lines[first] = indent + "pass"
            removed.discard(first)
    kept = "\n".join(line.rstrip() for i, line in enumerate(lines) if i not in removed)
    return re.sub(r"\n{4,}", "\n\n\n", kept).strip("\n")


def english_paragraphs(source: str) -> str:
    """The prose of a module's docstrings: paragraphs of at least eight words that are mostly letters, unwrapped.

    Doctests, parameter tables, code and formulas fall out, and with them most of what other domains hold too.
    """
    if sum(map(len, _TRIPLE_QUOTED.findall(source))) < 0.2 * len(source):
        return ""  # not worth the time to parse it
    found = []
    for _, text, _ in sorted(_docstrings(ast.parse(source)), key=lambda found: found[0].lineno):
        for paragraph in _BLANK_LINES.split(text):
            plain = " ".join(paragraph.split())
            if plain.count(" ") >= 7 and ">>>" not in plain and len(_NO_LETTER.findall(plain)) <= 0.15 * len(plain):
                found.append(plain)
    return "\n\n".join(found)


def formulas(source: str) -> str:
    """The statements of a test module, one a line and without `assert`: what the tests say about mathematics.

    >>> formulas("def test_sin(): assert sin(x).diff(x) == cos(x)")
    'sin(x).diff(x) == cos(x)'
    """
    lines = source.encode().split(b"\n")  # columns of ast count bytes
    found = []
    for node in _statements(ast.parse(source).body):
        first, last = node.lineno - 1, node.end_lineno or node.lineno
        taken = lines[first:last]
        taken[-1] = taken[-1][: node.end_col_offset]
        taken[0] = taken[0][node.col_offset :]
        segment = b"\n".join(taken).decode()
        if first + 1 == last or not re.search("[#'\"\\\\]", segment):
            text = " ".join(segment.split())  # much faster than unparse
        else:
            text = ast.unparse(node)
        if len(text) <= LONGEST_LINE and "\n" not in text:
            found.append(text)
    return "\n".join(found)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt | ast.expr]:
    for node in body:
        match node:
            case ast.Assert():
                yield node.test
            case ast.Assign() | ast.AugAssign() | ast.Expr(value=ast.Call()):
                yield node
            case ast.FunctionDef() | ast.With() | ast.For() | ast.If() | ast.ClassDef():
                yield from _statements(node.body)


def bytecode_listing(source: str) -> str:
    """What the compiler makes of a module: one instruction a line, the functions one after the other.

    ``dis`` prints addresses of code objects, and sets in an order that follows the hash seed: both are replaced.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in other people's sources
        waiting = [compile(source, "<module>", "exec", dont_inherit=True, optimize=2)]
    lines = []
    while waiting:
        code = waiting.pop(0)
        lines.append(f"{code.co_name} ({', '.join(code.co_varnames[: code.co_argcount])})")
        for step in dis.get_instructions(code):
            argument = _constant(step.argval) if step.opcode in dis.hasconst else step.argrepr
            lines.append(f"{step.offset:6d} {step.opname:<24} {argument}".rstrip())
        lines.append("")
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return "\n".join(line for line in lines if len(line) <= LONGEST_LINE)


def _constant(value: object) -> str:
    match value:
        case CodeType():
            return f"<code {value.co_name}>"
        case frozenset():
            return "{" + ", ".join(sorted(map(_constant, value))) + "}"
        case tuple():
            return "(" + ", ".join(map(_constant, value)) + ")"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ------------------------------------------------------------------------------------------------- C++, tables

_STABLE_GUARD = re.compile(
    r"#if !defined\(TORCH_STABLE_ONLY\).*\n(#pragma once\n)?|\n#else\n#error .*\n#endif[^\n]*\s*$"
)
_CPP_PIECE = re.compile(
    r"""(?P<keep>R"(?P<tag>[^\s()\\]{0,16})\(.*?\)(?P=tag)" | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])+')"""
    r"""| //(?:\\\n|[^\n])* | /\*.*?\*/""",
    re.DOTALL | re.VERBOSE,
)


def strip_cpp(source: str) -> str:
    """C++ source without comments; strings and character literals stay. Generated headers give nothing.

    >>> strip_cpp('int a = 1; // one' + chr(10) + 'auto s = "// no comment";')
    'int a = 1;\\nauto s = "// no comment";'
    """
    if "@generated" in source[:1000]:
        return ""
    plain = _CPP_PIECE.sub(lambda match: match["keep"] or " ", source)
    plain = _STABLE_GUARD.sub("", plain)  # recent torch writes the same lines around every header
    lines = [line.rstrip() for line in plain.split("\n") if len(line) <= LONGEST_LINE]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def _unicode_rows(start: int) -> str:
    """The rows of Unicode's character table for 256 code points; names that only repeat the number are left out."""
    rows = []
    for point in range(start, start + 256):
        character = chr(point)
        name = unicodedata.name(character, "")
        if not name or name.startswith(("CJK UNIFIED", "CJK COMPATIBILITY IDEO", "HANGUL SYLLABLE", "TANGUT", "NUSHU")):
            continue
        cases = [
            f"{ord(c):04X}" if len(c) == 1 and c != character else "" for c in (character.upper(), character.lower())
        ]
        rows.append(";".join((
            f"{point:04X}", name, unicodedata.category(character), str(unicodedata.combining(character)),
            unicodedata.bidirectional(character), unicodedata.decomposition(character),
            str(unicodedata.numeric(character, "")), "NY"[unicodedata.mirrored(character)],
            *cases, unicodedata.east_asian_width(character),
        )))  # fmt: skip
    return "\n".join(rows)


def _table_rows(text: str) -> str:
    return "\n".join(line for line in text.split("\n") if len(line) <= LONGEST_LINE)


DOMAINS: dict[str, Domain] = {
    "english_docs": Domain("prose of docstrings",
                           lambda: _python_files("stdlib", "torch", "numpy", "sympy", "networkx"), english_paragraphs),
    "python_code": Domain("Python without comments and docstrings",
                          lambda: _python_files("stdlib", "torch", "numpy", "networkx"), strip_python),
    "cpp_headers": Domain("C++ headers of torch without comments", _cpp_files, strip_cpp),
    "bytecode": Domain("the compiled standard library, one instruction a line", lambda: _python_files("stdlib"),
                       bytecode_listing),
    "symbolic_math": Domain("what sympy's tests state", _sympy_tests, formulas),
    "tables": Domain("Unicode's character table, numpy's reference values", _tables, _table_rows),
}  # fmt: skip
