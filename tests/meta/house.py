"""The import graph of the library: which floor each room stands on, and a drawing of it (``make house``).

It reads the source as text (ast), deferred imports and those for type checkers included, and runs none of it.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "equipoise"
FILES = sorted(SOURCE.rglob("*.py"))

# A room may import what stands on a lower floor, and itself. Rooms on one floor do not know each other.
FLOORS = (
    ("errors", "devices", "torch_internals"),
    ("functional", "kernels", "distributed", "storage"),
    ("autograd", "report"),
    ("policies", "layers", "external", "plan", "plot", "doctor"),
    ("balancer", "replay"),
    ("adapters", "adaptive", "conformance"),
    ("lab",),
    ("inspection", "evidence"),
    ("cli",),
)
WIDTH, ROW, BOX, GAP = 900, 74, 34, 14


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(text_of(path))


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def imports(path: Path, *, for_checkers: bool = True) -> Iterator[str]:
    """The absolute name of everything a file imports, at any depth."""
    package = ["equipoise", *path.relative_to(SOURCE).parent.parts]
    for node in _walk(tree_of(path), for_checkers):
        match node:
            case ast.Import(names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module, names, level):
                base = package[: len(package) - (level - 1)] if level else []
                whole = ".".join([*base, *([module] if module else [])])
                yield from (whole, *(f"{whole}.{alias.name}" for alias in names))


def _walk(node: ast.AST, for_checkers: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if for_checkers or not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield child
            yield from _walk(child, for_checkers)


def floor_of(room: str) -> int:
    found = [level for level, rooms in enumerate(FLOORS) if room in rooms]
    assert found, f"{room} has no floor: add it to FLOORS in tests/meta/house.py"
    return found[0]


def graph() -> dict[str, set[str]]:
    """Module -> the modules of the library that it imports."""
    modules = {module_of(path) for path in FILES}
    found: dict[str, set[str]] = {}
    for path in FILES:
        named = {name.partition(".")[2] for name in imports(path) if name.startswith("equipoise.")}
        found.setdefault(module_of(path), set()).update(named & modules - {module_of(path), ""})
    return found


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (Tarjan, 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in sorted(edges.get(node, ())):
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            at = stack.index(node)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(edges):
        if node not in order:
            visit(node)
    return found


def rooms() -> dict[str, tuple[int, int]]:
    """Room -> (files, lines)."""
    found: dict[str, tuple[int, int]] = {}
    for path in FILES:
        if (room := room_of(path)) not in ("__init__", "__main__"):
            files, lines = found.get(room, (0, 0))
            found[room] = (files + 1, lines + len(text_of(path).splitlines()))
    return found


def arrows() -> dict[tuple[str, str], int]:
    """(importing room, imported room) -> how many of its files do."""
    counts: dict[tuple[str, str], int] = {}
    for path in FILES:
        room = room_of(path)
        others = {name.split(".")[1] for name in imports(path) if name.count(".") and name.startswith("equipoise.")}
        for other in others & set(rooms()) - {room}:
            if room not in ("__init__", "__main__"):
                counts[room, other] = counts.get((room, other), 0) + 1
    return counts


def draw() -> str:
    """The house as SVG: a row for each floor, the highest on top; arrows point to what is imported."""
    sizes, edges = rooms(), arrows()
    height = ROW * len(FLOORS) + 30
    centers: dict[str, tuple[float, float]] = {}
    boxes: list[str] = []
    for level, row in enumerate(FLOORS):
        y = height - ROW * (level + 1)
        width = (WIDTH - 80 - GAP * (len(row) - 1)) / max(len(row), 2)
        x = 60 + (WIDTH - 80 - width * len(row) - GAP * (len(row) - 1)) / 2
        boxes.append(f'<text x="10" y="{y + 22}" class="floor">{level + 1}</text>')
        for room in row:
            files, lines = sizes[room]
            what = f"{files} files, {lines} lines" if files > 1 else f"{lines} lines"
            boxes.append(
                f'<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{BOX}" rx="5"/>'
                f'<text x="{x + width / 2:.0f}" y="{y + 14}" class="room">{escape(room)}</text>'
                f'<text x="{x + width / 2:.0f}" y="{y + 28}" class="size">{what}</text>'
            )
            centers[room] = (x + width / 2, y)
            x += width + GAP
    lines = []
    for (room, other), count in sorted(edges.items()):
        (x1, y1), (x2, y2) = centers[room], centers[other]
        if floor_of(other) > 0:  # every room imports the errors
            thick = 0.6 + min(count, 12) / 6
            lines.append(
                f'<path d="M{x1:.0f} {y1 + BOX} C{x1:.0f} {y1 + BOX + 30} {x2:.0f} {y2 - 30} {x2:.0f} {y2 - 2}" '
                f'stroke-width="{thick:.1f}" marker-end="url(#tip)"><title>{room} imports {other}: {count} files'
                "</title></path>"
            )
    style = (
        "rect{fill:#eef3f8;stroke:#4a6a8a}path{fill:none;stroke:#7a93ad;stroke-opacity:.55}"
        "text{font-family:sans-serif;text-anchor:middle;fill:#1c2b3a}.room{font-size:13px;font-weight:600}"
        ".size{font-size:10px;fill:#51657a}.floor{font-size:16px;text-anchor:start;fill:#8a9bab}"
    )
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5" markerHeight="5" orient="auto" '
        'markerUnits="userSpaceOnUse"><path d="M0 0L8 4L0 8z" style="fill:#7a93ad;stroke:none"/></marker></defs>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="The rooms of equipoise on {len(FLOORS)} floors; imports point down"><style>{style}</style>'
        f'<rect width="{WIDTH}" height="{height}" style="fill:#fff;stroke:none"/>{tip}'
        + "".join([*lines, *boxes])
        + "</svg>\n"
    )


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "house.svg"
    target.write_text(draw(), encoding="utf-8")
    groups = circles(graph())
    print(f"{target.relative_to(ROOT) if target.is_relative_to(ROOT) else target}: {len(FLOORS)} floors, ", end="")
    print(f"{len(rooms())} rooms, {len(groups)} circles" + "".join(f"\n  {' <-> '.join(group)}" for group in groups))
