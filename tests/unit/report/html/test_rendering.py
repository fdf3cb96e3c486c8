"""Templates: whatever they print is text, whoever wrote it, and nobody can switch that off."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import equipoise
from equipoise.errors import ConfigError
from equipoise.report import render_terminal, write_html
from equipoise.report.html.rendering import environment, render

SOURCE = Path(equipoise.__file__).parent
ALL_WAYS = """\
{% from "macros.html.jinja" import breakable, heads %}{% from "parts.html.jinja" import dotted, codes %}
<p title="{{ text }}" class='{{ text|slug }}'>{{ text }}</p><p>{{ text|minus }}</p><p>{{ breakable(text) }}</p>
<p>{{ [text, text]|join("+") }}</p><p>{{ text ~ "+" ~ text }}</p>{{ heads([text], ()) }}{{ dotted(0, text) }}
{{ codes([text, text]) }}{% for part in text|ticked %}{{ part }}{% endfor %}"""
WRITTEN = {"p", "thead", "tr", "th", "i", "wbr", "code", "br"}


class Read(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: dict[str, str | None] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= dict(attrs)


@settings(deadline=None)
@given(st.text(st.characters(codec="ascii", min_codepoint=32, max_codepoint=126)) | st.text())
def test_any_text_stays_text(text):
    written = environment().from_string(ALL_WAYS).render(text=text)
    found = Read(written)
    assert found.tags <= WRITTEN and set(found.attributes) == {"title", "class", "scope", "style"}
    assert not {"\x00", "\x1b", "\u202e", "\u2028"} & set(written)
    if text.isprintable():
        assert found.attributes["title"] == text


def test_nothing_switches_escaping_off():
    assert "safe" not in environment().filters and environment().autoescape is True
    templates = {path.name: path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.jinja")}
    assert {"report.html.jinja", "claims.html.jinja", "base.html.jinja"} <= set(templates)
    assert not [name for name, text in templates.items() if re.search(r"autoescape|\|\s*safe|tojson|xmlattr", text)]
    python = {path.name: path.read_text(encoding="utf-8") for path in [*SOURCE.glob("report/html/*.py"), *(
        SOURCE / "evidence" / f"{name}.py" for name in ("html_page", "html_claim", "pictures")),
        SOURCE / "plan" / "page.py"]}  # fmt: skip
    trusted = [name for name, text in python.items() if re.search(r"\bMarkup\(|__html__|\.from_string", text)]
    assert trusted == ["rendering.py"]
    assert not [name for name, text in python.items() if re.search(r"</?[a-z][a-z0-9]*[ >/]", text)]


def test_what_is_missing_is_an_error_not_a_gap():
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError):
        environment().from_string("{{ nowhere }}").render()


def test_without_jinja2_the_error_says_what_to_install_and_the_terminal_needs_none(comparison, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    environment.cache_clear()
    for asked in (
        lambda: write_html(comparison, tmp_path / "a"),
        lambda: render("claims.html.jinja", "equipoise.evidence"),
    ):
        with pytest.raises(ConfigError, match="jinja2") as found:
            asked()
        assert "equipoise[report]" in found.value.do
    assert comparison.headline[:20] in render_terminal(comparison)
    assert not list(tmp_path.iterdir())
