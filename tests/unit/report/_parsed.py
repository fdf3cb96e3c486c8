"""A page as its markup says it: tags in order, texts, attributes, scripts; and a name that wants to be markup."""

from __future__ import annotations

import base64
import gzip
import json
from html.parser import HTMLParser

EVIL = "<script>alert(1)</script><img src=http://example.org/x>\"'&%{x}</title>\u2028\u202e"
VOID = {"meta", "br", "img", "link", "wbr", "input"}


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
    def data(self) -> dict:
        return json.loads(self.unpacked("report-data"))

    def unpacked(self, identity: str) -> str:
        text = next(text for attrs, text in self.scripts if attrs.get("id") == identity)
        return gzip.decompress(base64.b64decode(text)).decode()
