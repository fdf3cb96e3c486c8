"""What the site adds to docs/*.md: the lab notes, a reference page for each public module, links to the repository."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
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
SETTINGS = ("ModelConfig", "DataConfig", "ParallelConfig", "TrainConfig", "CompareConfig")  # of lab/config/schema.py
LINK = re.compile(r"(\]\(|\bhref=\")((?:\.\./)[^)#\"\s]*)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fills in what of the navigation follows from the repository."""
    for section in config.nav or []:
        if "Reference" in section:
            section["Reference"] += [{title: f"reference/{title}.md"} for title in REFERENCE]
            section["Reference"] += [{"Settings of the lab": "reference/settings.md"}]
    notes = [{_title(note): f"{NOTES}/{note.name}"} for note in sorted((ROOT / NOTES).glob("*.md"), reverse=True)]
    assert config.nav is not None
    config.nav.append({"Lab notes": notes})
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds pages that do not lie in docs/."""
    for note in sorted((ROOT / NOTES).glob("*.md")):
        files.append(File.generated(config, f"{NOTES}/{note.name}", abs_src_path=str(note)))
    for title, sources in REFERENCE.items():
        page = f"# {title}\n\n" + "".join(_names(source, several=len(sources) > 1) for source in sources)
        files.append(File.generated(config, f"reference/{title}.md", content=page))
    files.append(File.generated(config, "reference/settings.md", content="".join(_settings())))
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


def _names(source: str, *, several: bool) -> str:
    """What mkdocstrings is asked for; under the name of the module where a page has several."""
    module = source.removesuffix(".py").replace("/", ".")
    level = "    options: {heading_level: 3}\n" if several else ""
    heading = f"## {module}\n\n" if several else ""
    return heading + "".join(f"::: {name}\n{level}\n" for name in _public(source))


def _settings() -> Iterator[str]:
    """A table for each part of a run's configuration, from its fields and the comments behind them."""
    lines = (ROOT / "src/equipoise/lab/config/schema.py").read_text(encoding="utf-8").splitlines()
    yield "# Settings of the lab\n\n`--set model.experts=32` and TOML files name them; `--print-config` prints them.\n"
    for found in ast.parse("\n".join(lines)).body:
        if not isinstance(found, ast.ClassDef) or found.name not in SETTINGS:
            continue
        said = (ast.get_docstring(found) or "").partition("\n\n")[0].replace("\n", " ")
        yield f"\n## {found.name.removesuffix('Config').lower()}\n\n{said}\n\n| setting | default | |\n|---|---|---|\n"
        for field in found.body:
            if isinstance(field, ast.AnnAssign) and field.end_lineno is not None:
                _, _, comment = lines[field.end_lineno - 1].partition("  # ")
                default = "" if field.value is None else f"`{ast.unparse(field.value)}`"
                yield f"| `{ast.unparse(field.target)}` | {default} | {comment.replace('|', chr(92) + '|')} |\n"


def _public(source: str) -> list[str]:
    """The dotted names in the ``__all__`` of a file; torch, which importing it would take, is not installed here."""
    module = ".".join(["equipoise", *PurePosixPath(source).with_suffix("").parts]).removesuffix(".__init__")
    for line in ast.parse((ROOT / "src/equipoise" / source).read_text(encoding="utf-8")).body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "__all__":
            return [f"{module}.{name}" for name in ast.literal_eval(line.value)]
    raise ValueError(f"no __all__ in {source}")


def _title(note: Path) -> Any:
    return note.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
