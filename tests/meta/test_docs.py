"""The pages: their code runs, their links lead somewhere, the site has each of them, the notebook runs."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
CODE = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
# Lines for a script of the engine, which is not installed here; tests/engines runs such lines in its trainings.
OF_ENGINES = {"automodel", "deepspeed", "megatron", "olmo-core", "torchtitan", "torchtitan-upstream"}
FRAGMENTS = {"parallel"}  # meshes of many ranks; tests/contracts/invariance has them


def blocks(page: Path) -> list[str]:
    return CODE.findall(page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Those that the site and GitHub give headings, and those written out."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", one).lower()).strip().replace(" ", "-") for one in headings}
    return made | set(re.findall(r'<a id="([^"]+)">', text))


@pytest.mark.parametrize("page", [one for one in PAGES if blocks(one)], ids=lambda page: page.stem)
def test_its_code_is_python_and_names_what_there_is(page):
    for block in blocks(page):
        for line in ast.walk(ast.parse(block)):
            if isinstance(line, ast.ImportFrom) and (line.module or "").startswith("equipoise"):
                module = importlib.import_module(line.module or "")  # an adapter imports without its engine
                assert all(hasattr(module, one.name) for one in line.names), ast.unparse(line)


@pytest.mark.parametrize(
    "page", [one for one in PAGES if blocks(one) and one.stem not in OF_ENGINES | FRAGMENTS], ids=lambda page: page.stem
)
def test_its_code_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, block in enumerate(blocks(page)):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_its_links_lead_to_files_and_headings(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(((?!https?:|mailto:)[^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_the_site_has_every_page():
    named = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(named) == [page.name for page in PAGES]


def cells() -> list[str]:
    notebook = json.loads((ROOT / "examples/learn.ipynb").read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "clear the outputs"
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_runs_up_to_the_comparison(capsys):
    names: dict = {}
    for cell in cells()[:3]:
        exec(compile(cell.replace("EXPERTS = 300,", "EXPERTS = 4,"), "cell", "exec"), names)
    said = capsys.readouterr().out
    assert said.count("MaxVio") == 4 and "global_batch" in said
    assert float(said.rsplit("largest difference", 1)[1].split()[0]) < 1e-12


@pytest.mark.full
def test_the_notebook_runs_from_top_to_bottom():
    names: dict = {}
    for cell in cells():
        exec(compile(cell, "cell", "exec"), names)
