"""The house rules, held by a machine: who may import whom, how long things are, and what every file begins with.

A rule is one test that lists all that break it; it reads the source as text and says nothing about what the code does.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

from meta.house import (
    FILES,
    FLOORS,
    ROOT,
    SOURCE,
    circles,
    floor_of,
    graph,
    imports,
    name_of,
    room_of,
    text_of,
    tree_of,
)

PYTHON = [*FILES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
OPTIONAL = {"PIL", "accelerate", "axolotl", "datasets", "jinja2", "lightning", "llamafactory", "lm_eval", "markupsafe",
            "megatron", "mlflow", "nemo_automodel", "olmo_core", "omegaconf", "pandas", "peft", "plotly", "pyarrow",
            "pydantic", "ray", "rich", "safetensors", "sklearn", "swift", "tensorboard", "tokenizers", "torchtitan",
            "transformers", "triton", "trl", "wandb", "yaml", "zstandard"}  # fmt: skip
EDGE = {"adapters", "cli", "conformance", "doctor", "inspection", "lab", "report"}  # the only rooms that may use them
EXCEPTIONS = {"evidence": {"lm_eval", "transformers"}, "kernels": {"triton"}, "storage": {"safetensors"}}
# the only files that may name torch.distributed
DISTRIBUTED = {"conformance/processes.py", "distributed.py", "lab/training/distributed.py"}
WITHOUT_TORCH = {"doctor", "functional/convert.py", "plan", "plot", "report", *(f"storage/{one}.py" for one in (
    "cache", "codec", "files", "inspection_record", "locks", "run_record"))}  # fmt: skip
LONGEST_FILE, LONGEST_FUNCTION, MOST_FLOORS, MOST_FLAT = 400, 60, 9, 7
LONGER = {"train": 120}  # the train loop is read from top to bottom


def sort_key(name: str) -> tuple[int, str]:
    """CONSTANTS, then Classes, then functions: the order that ruff keeps (RUF022)."""
    return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2), name


def test_imports_point_down_and_in_no_circle():
    assert len(FLOORS) <= MOST_FLOORS
    wrong = [
        f"{name_of(path)} imports {module}, which is not on a lower floor"
        for path in FILES
        if (room := room_of(path)) not in ("__init__", "__main__")
        for module in imports(path)
        if module.startswith("equipoise.")
        and (other := module.split(".")[1]) not in (room, "__version__", "Balancer")
        and floor_of(other) >= floor_of(room)
    ]
    assert not wrong
    assert not circles(graph())


def test_few_modules_are_flat_and_every_package_has_a_face():
    assert len([path for path in FILES if path.parent == SOURCE]) <= MOST_FLAT
    assert not [folder.name for folder in {path.parent for path in FILES} if not (folder / "__init__.py").exists()]
    assert not [path for path in FILES if path.stem in ("utils", "util", "helpers", "common", "misc")]


def test_optional_packages_stay_at_the_edge():
    wrong = {
        name_of(path): used
        for path in FILES
        if (room := room_of(path)) not in EDGE
        and (used := {one.partition(".")[0] for one in imports(path)} & OPTIONAL - EXCEPTIONS.get(room, set()))
    }
    assert not wrong


def test_one_door_to_other_processes():
    wrong = []
    for path in FILES:
        used = {ast.unparse(node) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)}
        used |= set(imports(path, for_checkers=False))
        if name_of(path) not in DISTRIBUTED and any(f"{one}.".startswith("torch.distributed.") for one in used):
            wrong.append(name_of(path))
    assert not wrong


def test_private_names_of_torch_are_in_one_file():
    """After an upgrade of torch one file is looked at."""
    private = re.compile(
        r"torch\.[\w.]*\._[a-z]|torch\._[a-z]|from torch[\w.]* import _|\b_fsdp|\b_optimizer_step|_is_mkldnn"
    )
    found = {name_of(path) for path in FILES if private.search(text_of(path))}
    assert found == {"torch_internals.py"}


def test_reports_and_plans_need_no_torch():
    wrong = [
        f"{name_of(path)} imports {module}"
        for path in FILES
        if {room_of(path), name_of(path)} & WITHOUT_TORCH
        for module in imports(path, for_checkers=False)
        if module.partition(".")[0] == "torch"
        or (
            module.startswith("equipoise.")
            and module.split(".")[1] not in ("doctor", "errors", "plan", "report", "storage")
            and not module.startswith("equipoise.functional.convert")
        )
    ]
    assert not wrong


def test_files_and_functions_are_short_and_files_say_what_they_are_for():
    wrong = []
    for path in PYTHON:
        text, name = text_of(path), path.relative_to(ROOT).as_posix()
        if path in FILES and len(text.splitlines()) >= LONGEST_FILE:
            wrong.append(f"{name}: {len(text.splitlines())} lines")
        first = (ast.get_docstring(tree_of(path)) or "").partition("\n")[0]
        if text.strip() and not (first.endswith((".", ":")) and text.startswith(('"""', 'r"""', "#!"))):
            wrong.append(f"{name}: its first line is no sentence")
        for node in ast.walk(tree_of(path)) if path in FILES else ():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length >= LONGER.get(node.name, LONGEST_FUNCTION):
                    wrong.append(f"{name}, {node.name}: {length} lines")
    assert not wrong


def test_all_is_there_and_sorted():
    wrong = []
    for path in FILES:
        tree = tree_of(path)
        lists = [
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ]
        defines = any(isinstance(n, ast.FunctionDef | ast.ClassDef | ast.ImportFrom) for n in tree.body)
        if path.name != "__main__.py" and defines:
            is_good = len(lists) == 1 and lists[0] == sorted(set(lists[0]), key=sort_key)
            wrong += [] if is_good else [name_of(path)]
    assert not wrong


def test_nothing_is_left_for_later():
    words = ["TO" + "DO", "FIX" + "ME", "X" * 3, "NotImplemented" + "Error"]
    assert not [path for path in PYTHON if re.search(rf"\b({'|'.join(words)})\b", text_of(path))]


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
    assert not loaded("import equipoise.report") & {"jinja2", "plotly", "pandas"}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 100


def test_the_version_is_one():
    import equipoise

    assert equipoise.__version__ == importlib.metadata.version("equipoise")


def test_the_lock_pins_everything_and_names_no_place():
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.!]+", pin) for pin in pins)
    assert "torch==2.13.0" in pins


def test_the_drawing_of_the_house_is_of_this_house(tmp_path: Path):
    drawn = subprocess.run(
        [sys.executable, "-m", "meta.house", str(tmp_path / "house.svg")],
        cwd=ROOT / "tests", capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert "0 circles" in drawn.stdout
    assert all(
        f">{room}</text>" in (tmp_path / "house.svg").read_text(encoding="utf-8") for row in FLOORS for room in row
    )
