"""The readme of a built package: README.md with links that work outside the repository.

A package index shows README.md without the files beside it, so its relative links would lead nowhere and its pictures
would be missing. In the metadata they point to the files of this version's tag.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<path>(?![a-z]+:|#)[^)]+)\)")


class Readme(MetadataHookInterface):
    """Hatchling's hook for ``dynamic = ["readme"]``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Adds the readme to the project's metadata."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        home, tag = metadata["urls"]["Repository"], f"v{metadata['version']}"
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(text, home, tag)}


def absolute(text: str, home: str, tag: str) -> str:
    """Markdown whose relative links point to the files of a tag: pages as GitHub shows them, pictures as they are."""
    raw = home.replace("https://github.com/", "https://raw.githubusercontent.com/")

    def link(found: re.Match[str]) -> str:
        picture, words, path = found["picture"], found["text"], found["path"]
        return f"{picture}[{words}]({raw}/{tag}/{path})" if picture else f"[{words}]({home}/blob/{tag}/{path})"

    return LINK.sub(link, text)
