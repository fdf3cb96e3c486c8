"""The house rules, held by a machine: who may import whom, how long things are, and what every file begins with.

It reads the source as text (ast) and says nothing about what the code does.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "equipoise"
FILES = sorted(SOURCE.rglob("*.py"))
PYTHON = [*FILES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]

# A part may import what stands on a lower floor, and itself. Parts on one floor do not know each other.
FLOORS = [
    {"errors", "levels", "looking", "own_loss", "rehearsal"},
    {"declared", "functional", "collectives", "records", "kernels"},
    {"faults", "meter", "registry"},
    {"layouts", "measure"},
    {"shards"},
    {"layout", "native", "plan", "policies", "readers", "report", "tie"},
    {"probing"},
    {"facts"},
    {"rechoice"},
    {"degenerate", "foreign", "layers", "plot", "pressure"},
    {"discover", "passes", "reconcile", "state"},
    {"forwards", "ledger", "missing"},
    {"attach", "checks", "describe", "readout", "tap", "verdicts", "watch"},
    {"evaluation", "stepping"},
    {"balancer"},
    {"adapters"},
    {"lab"},
    {"inspection"},
    {"cli"},
    {"__main__"},
]
OPTIONAL = {"accelerate", "datasets", "lightning", "mlflow", "pandas", "peft", "plotly", "pyarrow",
            "rich", "safetensors", "tensorboard", "tokenizers", "torchtitan", "transformers", "triton", "trl",
            "wandb", "zstandard"}  # fmt: skip
EDGE = {"adapters", "cli", "inspection", "lab", "report"}  # the only parts that may use them
DISTRIBUTED = {"collectives.py", "lab/parallel.py"}  # the only files that may name torch.distributed
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
LONGER = {"train": 120}  # the train loop is read from top to bottom


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(text_of(path))


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """The absolute name of everything a file imports, at any depth; what only type checkers see is left out."""
    package = ["equipoise", *path.relative_to(SOURCE).parent.parts]
    for node in walk(tree_of(path)):
        match node:
            case ast.Import(names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module, names, level):
                base = package[: len(package) - (level - 1)] if level else []
                whole = ".".join([*base, *([module] if module else [])])
                yield from (whole, *(f"{whole}.{alias.name}" for alias in names))


def walk(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield child
            yield from walk(child)


def floor_of(part: str) -> int:
    found = [level for level, parts in enumerate(FLOORS) if part in parts]
    assert found, f"{part} has no floor: add it to FLOORS"
    return found[0]


def sort_key(name: str) -> tuple[int, str]:
    """CONSTANTS, then Classes, then functions: the order that ruff keeps (RUF022)."""
    return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2), name


@pytest.mark.parametrize("path", [f for f in FILES if f.parent != SOURCE or f.name != "__init__.py"], ids=name_of)
def test_imports_point_down(path):
    part = part_of(path)
    for module in imports(path):
        package, _, rest = module.partition(".")
        other = rest.partition(".")[0]
        if package == "equipoise" and other not in ("", part, "__version__"):
            assert floor_of(other) < floor_of(part), f"{name_of(path)} imports {module}, which is not on a lower floor"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_optional_packages_stay_at_the_edge(path):
    if part_of(path) not in EDGE:
        allowed = {"triton"} if part_of(path) == "kernels" else set()
        assert not {module.partition(".")[0] for module in imports(path)} & OPTIONAL - allowed


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_one_door_to_other_processes(path):
    tree = tree_of(path)
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= set(imports(path))
    named = {one for one in used if one == "torch.distributed" or one.startswith("torch.distributed.")}
    if name_of(path) not in DISTRIBUTED:
        assert not named


@pytest.mark.parametrize("path", [f for f in FILES if part_of(f) in ("plan", "plot", "report")], ids=name_of)
def test_reports_and_plans_need_no_torch(path):
    for module in imports(path):
        assert module.partition(".")[0] != "torch"
        if module.startswith("equipoise."):
            assert module.split(".")[1] in ("errors", "plan", "records", "report")  # the rest loads torch


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_are_short_and_begin_with_their_purpose(path):
    text = text_of(path)
    if path in FILES:
        assert len(text.splitlines()) < LONGEST_FILE
    if not text.strip():
        return
    first = (ast.get_docstring(tree_of(path)) or "").partition("\n")[0]
    assert first.endswith((".", ":")), "the first line is a sentence that says what the file is for"
    assert text.startswith(('"""', 'r"""', "#!"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_are_short(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length < LONGER.get(node.name, LONGEST_FUNCTION), f"{node.name}: {length} lines"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_all_is_there_and_sorted(path):
    tree = tree_of(path)
    lists = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    if path.name == "__main__.py" or not any(
        isinstance(n, ast.FunctionDef | ast.ClassDef | ast.ImportFrom) for n in tree.body
    ):
        return
    assert len(lists) == 1, "one literal __all__"
    assert lists[0] == sorted(lists[0], key=sort_key)
    assert len(set(lists[0])) == len(lists[0])


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_left_for_later(path):
    text = text_of(path)
    words = ["TO" + "DO", "FIX" + "ME", "X" * 3, "NotImplemented" + "Error"]
    assert not re.findall(rf"\b({'|'.join(words)})\b", text)


def test_no_file_is_a_drawer():
    assert not [path for path in FILES if path.stem in ("utils", "util", "helpers", "common", "misc")]


def test_every_package_has_a_face():
    folders = {path.parent for path in FILES}
    assert not [folder.name for folder in folders if not (folder / "__init__.py").exists()]


def loaded(statement: str) -> set[str]:
    """Top-level modules that a fresh Python holds after a statement."""
    program = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


def test_importing_the_library_loads_no_optional_package():
    modules = loaded("import equipoise")
    assert "torch" in modules
    assert not modules & OPTIONAL


def test_importing_the_report_parts_loads_no_optional_package_at_once():
    assert not loaded("import equipoise.report") & {"plotly", "pandas"}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200


def test_the_version_is_one():
    import equipoise

    assert equipoise.__version__ == importlib.metadata.version("equipoise")


def test_the_lock_pins_everything_and_names_no_place():
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.!]+", pin) for pin in pins)
    assert "torch==2.13.0" in pins
