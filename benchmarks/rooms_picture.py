"""Draws the rooms of the package from its imports, and writes the table beside the picture.

    python -m benchmarks.rooms_picture

A room is a folder or a file right under the package. The picture (docs/figures/rooms.svg) stands them in
layers: a room lies above all that it imports. An arrow that follows from others is left out; the table in
docs/decisions/rooms.md names every room that a room imports. What a room names in a string, to import it when
it is needed, is an arrow with dashes.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from html import escape

from benchmarks._common import arguments_of
from benchmarks._places import ROOT
from benchmarks._source import Package, circles, edges
from benchmarks._tables import fill, markdown

FIGURE = ROOT / "docs" / "figures" / "rooms.svg"
PAGE = ROOT / "docs" / "decisions" / "rooms.md"

Graph = dict[str, set[str]]

BOX_WIDTH, BOX_HEIGHT, GAP, LAYER_HEIGHT = 108, 30, 16, 74


@dataclass(frozen=True)
class House:
    """What the imports say of the rooms. ``strings`` holds imports that only a string names."""

    questions: dict[str, str]
    imports: Graph
    strings: Graph


def house(package: Package) -> House:
    """Read the rooms, and who imports whom, from the source."""
    files = {module.name: module for module in package.modules}
    rooms = sorted({room_of(name) for name in files if room_of(name)})
    questions = {
        room: _first_sentence(ast.get_docstring(files[f"distcomp.{room}"].tree) or "") for room in rooms
    }
    plain = between_rooms(edges(package, strings=False))
    every = between_rooms(edges(package))
    return House(questions, plain, {room: every[room] - plain[room] for room in rooms})


def room_of(module: str) -> str:
    """The second part of a dotted name; empty for the package's own two files."""
    parts = module.split(".")
    return "" if len(parts) == 1 or parts[1] == "__main__" else parts[1]


def between_rooms(graph: Graph) -> Graph:
    rooms: Graph = {room_of(module): set() for module in sorted(graph)}
    rooms.pop("", None)
    for module, others in graph.items():
        if room := room_of(module):
            rooms[room] |= {room_of(other) for other in others} - {room, ""}
    return rooms


def _first_sentence(text: str) -> str:
    """Of the first paragraph, up to a full stop or a question mark, on one line, without reST's markup."""
    text = text.partition("\n\n")[0]
    joined = re.sub(r":\w+:`[~.]?([^`]+)`", r"`\1`", " ".join(text.split()).replace("``", "`"))
    return re.split(r"(?<=[.?!]) (?=[A-Z`])", joined, maxsplit=1)[0]


def layers(graph: Graph) -> list[list[str]]:
    """The rooms from top to bottom: each one above all that it imports, as low as that lets it."""
    knots = circles(graph)
    if knots:
        raise SystemExit(f"rooms that import each other in a circle have no layers: {knots}")
    height: dict[str, int] = {}

    def rank(room: str) -> int:
        if room not in height:
            height[room] = 1 + max((rank(other) for other in graph[room]), default=-1)
        return height[room]

    for room in sorted(graph):
        rank(room)
    return [
        sorted(room for room in graph if height[room] == level)
        for level in range(max(height.values()), -1, -1)
    ]


def reduced(graph: Graph) -> list[tuple[str, str]]:
    """The imports that do not follow from others (the transitive reduction), in order."""
    reach: Graph = {}

    def below(room: str) -> set[str]:
        if room not in reach:
            reach[room] = set().union(*({other} | below(other) for other in graph[room]))
        return reach[room]

    return [
        (room, other)
        for room in sorted(graph)
        for other in sorted(graph[room])
        if not any(other in below(between) for between in graph[room] - {other})
    ]


def table(found: House) -> str:
    """Every room: its question, and all that it imports."""
    rows = []
    for level in layers(found.imports):
        for room in level:
            names = [f"`{other}`" for other in sorted(found.imports[room])]
            names += [f"`{other}` (when needed)" for other in sorted(found.strings[room])]
            rows.append(
                [f"`{room}`", found.questions[room].replace("|", "\\|"), ", ".join(names) or "nothing"]
            )
    return markdown(["room", "what it answers", "imports"], rows)


def drawn_edges(found: House) -> list[tuple[str, str]]:
    """The arrows of the picture."""
    return reduced(found.imports) + [
        (room, other) for room in sorted(found.strings) for other in sorted(found.strings[room])
    ]


def picture(found: House) -> str:
    """The SVG. Its metadata holds the arrows as JSON, for whoever wants to compare them."""
    rows = layers(found.imports)
    width = max(len(row) for row in rows) * (BOX_WIDTH + GAP) + GAP
    height = len(rows) * LAYER_HEIGHT + GAP
    places = {
        room: (
            width * (index + 1) / (len(row) + 1)
            if len(row) < 3
            else width * (2 * index + 1) / (2 * len(row)),
            GAP + BOX_HEIGHT / 2 + LAYER_HEIGHT * level,
        )
        for level, row in enumerate(rows)
        for index, room in enumerate(row)
    }
    solid = [_arrow(places, edge, "") for edge in reduced(found.imports)]
    dashed = [
        _arrow(places, (room, other), ' stroke-dasharray="4 3"')
        for room in sorted(found.strings)
        for other in sorted(found.strings[room])
    ]
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="inherit" font-size="13">',
        f"<title>The rooms of distcomp</title>\n<metadata>{json.dumps(drawn_edges(found))}</metadata>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#777"/></marker></defs>',
        f'<g fill="none" stroke="#777" marker-end="url(#tip)">\n{chr(10).join(solid + dashed)}\n</g>',
        *(_box(room, place) for room, place in places.items()),
        "</svg>\n",
    ])  # fmt: skip


def _arrow(places: dict[str, tuple[float, float]], edge: tuple[str, str], style: str) -> str:
    """From the lower side of one box to the upper side of another; the other way about where it points up."""
    (x, y), (to_x, to_y) = (places[room] for room in edge)
    half = BOX_HEIGHT / 2 if to_y > y else -BOX_HEIGHT / 2
    y, to_y = y + half, to_y - half
    middle = (y + to_y) / 2
    curve = f"M{x:.1f} {y:.1f}C{x:.1f} {middle:.1f} {to_x:.1f} {middle:.1f} {to_x:.1f} {to_y:.1f}"
    return f'<path d="{curve}"{style}/>'


def _box(room: str, place: tuple[float, float]) -> str:
    x, y = place
    corner = f'x="{x - BOX_WIDTH / 2:.1f}" y="{y - BOX_HEIGHT / 2:.1f}"'
    return (
        f'<rect {corner} width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="5" fill="#eef3fa" stroke="#4477aa"/>'
        f'<text x="{x:.1f}" y="{y + 4.5:.1f}" text-anchor="middle" fill="#222">{escape(room)}</text>'
    )


def main() -> None:
    arguments_of(__doc__).parse_args()
    found = house(Package(ROOT))
    FIGURE.write_text(picture(found))
    fill(PAGE, "rooms", table(found))


if __name__ == "__main__":
    main()
