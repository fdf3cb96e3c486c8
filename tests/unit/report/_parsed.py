"""A page as its markup says it: tags in order, texts, attributes, scripts; and a name that wants to be markup."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from typing import Any

from equipoise.report.html.rendering import environment
from equipoise.report.html.widgets import Part

EVIL = "<script>alert(1)</script><img src=http://example.org/x>\"'&%{x}</title>\u2028\u202e"
VOID = {"meta", "br", "img", "link", "wbr", "input"}
HOSTILE = ("<img src=x onerror=alert(1)>", "\"&'</script>", '" onfocus="alert(1)', "{{ 7 * 7 }}{% raw %}", EVIL)


def drawn(*parts: Part) -> str:
    """Parts of the report's sections as HTML."""
    macros = environment().get_template("parts.html.jinja").module
    return "".join(getattr(macros, kind)(**data) for kind, data in parts)


def renamed(value: Any, more: str, keys: frozenset[str] = frozenset()) -> Any:
    """A copy in which every text ends with ``more``: those in fields and lists, and the ``keys`` of dictionaries."""
    if isinstance(value, str):
        return value + more
    if isinstance(value, Mapping):
        return {f"{k}{more}" if k in keys else k: renamed(v, more, keys) for k, v in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(renamed(one, more, keys) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: renamed(getattr(value, f.name), more, keys) for f in fields(value) if f.init})
    return value


class Page(HTMLParser):
    """Checks that tags are closed in order; collects text, tags and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append((self.tags[-1][1], data))
        elif self.open and self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    @property
    def skeleton(self) -> list[tuple[str, list[str]]]:
        """Elements with the names of their attributes; without the line breaks that a name allows."""
        return [(tag, sorted(attrs)) for tag, attrs in self.tags if tag != "wbr"]

    @property
    def data(self) -> dict:
        return json.loads(self.unpacked("report-data"))

    def unpacked(self, identity: str) -> str:
        text = next(text for attrs, text in self.scripts if attrs.get("id") == identity)
        return gzip.decompress(base64.b64decode(text)).decode()
