"""What the site adds to docs/*.md: the lab notes, a reference page for each public module, links to the repository."""

from __future__ import annotations

import ast
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
NOTES = "lab-notes"
REFERENCE = {  # title -> files under src/equipoise: every name of their __all__ is on that page
    "equipoise": ("__init__.py",),
    "functional": ("functional/__init__.py",),
    "layers": ("layers/__init__.py",),
    "policies": ("policies/__init__.py",),
    "adapters": tuple(f"adapters/{name}.py" for name in (
        "hf", "lightning", "axolotl", "llamafactory", "torchtitan", "megatron", "deepspeed", "olmo_core",
        "automodel",
    )),
    "plot": ("plot.py",),
}  # fmt: skip
LINK = re.compile(r"(\]\(|\bhref=\")((?:\.\./)[^)#\"\s]*)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fills in what of the navigation follows from the repository."""
    for section in config.nav or []:
        if "Reference" in section:
            section["Reference"] += [{title: f"reference/{title}.md"} for title in REFERENCE]
    notes = [{_title(note): f"{NOTES}/{note.name}"} for note in sorted((ROOT / NOTES).glob("*.md"), reverse=True)]
    assert config.nav is not None
    config.nav.append({"Lab notes": notes})
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds pages that do not lie in docs/."""
    for note in sorted((ROOT / NOTES).glob("*.md")):
        files.append(File.generated(config, f"{NOTES}/{note.name}", abs_src_path=str(note)))
    for title, sources in REFERENCE.items():
        page = f"# {title}\n\n" + "".join(f"::: {name}\n\n" for source in sources for name in _public(source))
        files.append(File.generated(config, f"reference/{title}.md", content=page))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A link out of docs/ to a page of this site goes there, any other to the file in the repository."""
    known = {file.src_uri for file in files}
    here = PurePosixPath(page.file.src_uri).parent
    depth = len(here.parts)  # of a lab note 1: beside docs/ in the repository, inside it here

    def moved(found: re.Match[str]) -> str:
        begin, link = found.groups()
        path = re.sub(r"^(\.\./)+", "", link)
        inside = path.removeprefix("docs/")
        if inside in known:
            return begin + "../" * depth + inside
        return f"{begin}{config.repo_url}/blob/main/{path}"

    return LINK.sub(moved, markdown)


def _public(source: str) -> list[str]:
    """The dotted names in the ``__all__`` of a file; torch, which importing it would take, is not installed here."""
    module = ".".join(["equipoise", *PurePosixPath(source).with_suffix("").parts]).removesuffix(".__init__")
    for line in ast.parse((ROOT / "src/equipoise" / source).read_text(encoding="utf-8")).body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "__all__":
            return [f"{module}.{name}" for name in ast.literal_eval(line.value)]
    raise ValueError(f"no __all__ in {source}")


def _title(note: Path) -> Any:
    return note.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
