"""Fills the templates of pages: what they print is cleaned and escaped, unless a template has made it.

Nobody has to remember it: the filter that would switch it off is gone, and what is missing is an error, not a gap.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from ...errors import ConfigError
from ..data.formatting import clean

__all__ = ["environment", "render", "slug"]

HERE = "equipoise.report.html"


def render(name: str, package: str = HERE, **data: Any) -> str:
    """A template of ``package`` as text. Raises ConfigError where jinja2 is missing."""
    return environment(package).get_template(name).render(data)


@functools.cache
def environment(package: str = HERE) -> Any:
    """The jinja2 environment of a package's templates, which build on those of the report."""
    try:
        from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError:
        raise ConfigError(expected="jinja2, which writes the page", got="it is not installed",
                          do="pip install 'equipoise[report]', or leave the page out") from None  # fmt: skip
    places = ((package, "templates"), (HERE, "templates"), (HERE, "assets"))
    loader = ChoiceLoader([PackageLoader(*place) for place in places])
    made = Environment(
        loader=loader, autoescape=True, finalize=_printed, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    del made.filters["safe"]
    made.filters |= {"minus": minus, "parts": _parts, "slug": slug, "ticked": _ticked}
    made.globals["asset"] = lambda name: Markup(loader.get_source(made, name)[0])  # our own styles and scripts
    return made


def minus(text: str) -> str:
    """The sign of numbers as a minus; a hyphen within a name stays one.

    >>> minus("loss-free: -0.8 %")
    'loss-free: −0.8 %'
    """
    return re.sub(r"(?<!\w)-(?=[\d∞])", "−", text)


def slug(text: str) -> str:
    """A name for ids and classes.

    >>> slug("All numbers"), slug("§")
    ('all-numbers', '')
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _printed(value: object) -> object:
    """What a template prints, before it is escaped."""
    return value if hasattr(value, "__html__") else clean(str(value))


def _parts(name: str) -> list[str]:
    """A name cut where a line may break: global+ micro, global@ 0.02, Qwen/ Qwen3."""
    return re.split(r"(?<=[+@:/_])", name)


def _ticked(text: str) -> list[str]:
    """Text and, at odd places, what stands in it between backticks; lines joined."""
    return re.split(r"`([^`]+)`", " ".join(text.split()))
