"""For the site: docstrings as Markdown. Examples become blocks of code, and ``<w, p>`` is no HTML."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^( *)>>> .*?(?=\n\s*\n|\Z)", flags=re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(```.*?```|``.*?``|`[^`]*`)", flags=re.DOTALL)


class Examples(griffe.Extension):
    """Left alone, ``>>>`` would be quotations in quotations."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = EXAMPLE.sub(r"\1```pycon\n\g<0>\n\1```", obj.docstring.value)
            parts = CODE.split(text)  # text and code in turn
            parts[::2] = [part.replace("<", "&lt;") for part in parts[::2]]
            obj.docstring.value = "".join(parts)
