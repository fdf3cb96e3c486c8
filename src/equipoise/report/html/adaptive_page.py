"""The result of `equipoise adapt` as one HTML file without scripts: the curve with its knee, and all tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...storage.adaptive_record import Adaptive
from ..text.adaptive import CACHE_NOTE, CURVE_NOTE, LAYER_NOTE, Cells, cache_table, curve_table, layer_table, words_of
from .page import write_file
from .pictures import WIDE, Picture, Text, dots, round_numbers, scale, through
from .rendering import render
from .widgets import Cell, Section, table

__all__ = ["curve_picture", "render_adaptive_page", "write_adaptive_page"]

HIGH, LEFT, RIGHT, TOP, BOTTOM = 360, 96, WIDE - 16, 16, 300


def write_adaptive_page(path: Path, found: Adaptive) -> Path:
    """Raises ConfigError where jinja2 is missing, OutputError where the file cannot be written."""
    return write_file(path, render_adaptive_page(found))


def render_adaptive_page(found: Adaptive) -> str:
    """The page as text. Equal results give equal bytes."""
    facts = found.facts
    curve = [("curve", {"one": curve_picture(found)}), _table("curve", "Budgets", curve_table(found))]
    sections = [
        Section("Fewer experts against held-out loss", CURVE_NOTE, curve),
        Section("Layers", LAYER_NOTE, [_table("layers", "Layers", layer_table(found))]),
    ]
    if found.caches:
        parts = [_table("caches", "Caches", cache_table(found), left=(1, 2))]
        sections.append(Section("Caches of experts, simulated", CACHE_NOTE, parts))
    return render(
        "adaptive.html.jinja", title=facts.model, styles=("base", "tables", "pictures", "print"),
        headline=words_of(found).partition(". ")[2] or words_of(found), quality="", problems=found.problems,
        facts=[facts.model, facts.family, facts.data, f"{facts.device}, {facts.dtype}", facts.created],
        sections=sections, version=facts.versions.get("equipoise", ""),
    )  # fmt: skip


def curve_picture(found: Adaptive) -> Picture:
    """The increase of held-out loss over the share of experts that was dropped; a dot marks what was saved."""
    start = found.curve[0].loss
    lines = {
        "treated": [(point.fewer, point.loss - start) for point in found.curve],
        "baseline": [(point.control_fewer, point.control_loss - start) for point in found.curve],
    }
    xs, ys = zip(*[point for line in lines.values() for point in line], strict=True)
    low, high = min(0.0, *ys), max(0.0, *ys)
    room = 0.05 * (high - low) or 0.01
    x, y = scale(0.0, max(*xs, 0.01), LEFT, RIGHT), scale(low - room, high + room, BOTTOM, TOP)
    rows, columns = round_numbers(low - room, high + room), round_numbers(0.0, max(*xs, 0.01))
    paths = [("grid", "".join(f"M{LEFT} {y(tick)}H{RIGHT}" for tick in rows)), ("zero", f"M{LEFT} {y(0)}H{RIGHT}")]
    texts: list[Text] = [("end", LEFT - 10, y(tick) + 8, f"{tick:g}") for tick in rows]
    texts += [("", x(tick), BOTTOM + 28, f"{tick:.0%}") for tick in columns]
    texts.append(("", (LEFT + RIGHT) // 2, BOTTOM + 56, "fewer experts"))
    for name, line in lines.items():
        paths.append((f"line {name}", through((x(a), y(b)) for a, b in line)))
        paths.append((f"dots {name}", dots((x(a), y(b)) for a, b in line)))
    paths.append(("mean", dots([(x(found.saved.fewer), y(found.saved.loss - start))])))
    label = f"increase of held-out loss over fewer experts; saved at {found.saved.fewer:.0%}"
    return Picture("chart large", WIDE, HIGH, paths, texts, label=label)


def _table(name: str, label: str, cells: Cells, left: Sequence[int] = ()) -> tuple[str, dict]:
    header, rows = cells
    return table(name, label, header, [[Cell(text) for text in row] for row in rows], (0, *left))
