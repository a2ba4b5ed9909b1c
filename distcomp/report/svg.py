"""Line charts as inline SVG. Colours are left to the style sheet, so one drawing serves light and dark.

A chart is drawn for one width in pixels; the page draws each for wide and for narrow screens, and shows one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 42
COLOURS = 8
MARKS = 6
"""Markers along a line: enough to tell lines apart without colour, few enough to see the line."""


@dataclass(frozen=True)
class Line:
    """One run's points; ``style`` picks colour, dash and marker, and ``label`` is what a pointer is told."""

    style: int
    label: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Band:
    """How far the runs of a line spread: (x, low, high)."""

    style: int
    points: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Axis:
    """From ``low`` to ``high``, linear or logarithmic."""

    low: float
    high: float
    write: Callable[[float], str]
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, wanted: int) -> list[float]:
        """Round values within the axis, about as many as wanted."""
        return (
            _log_ticks(self.low, self.high, wanted)
            if self.log
            else _linear_ticks(self.low, self.high, wanted)
        )


def span(
    values: Sequence[float], write: Callable[[float], str], log: bool = False, zero: bool = False
) -> Axis:
    """The axis that shows all values with a little room; ``zero`` begins it at 0."""
    low, high = min(values), max(values)
    if log:
        low, high = low / 1.15, high * 1.15
    else:
        low = 0.0 if zero else low
        least = 1e-6 * max(1.0, abs(low), abs(high))  # nobody reads differences that are smaller
        room = 0.04 * (high - low) if high - low > least else 0.5 * max(1.0, abs(high))
        low, high = low if zero else low - room, high + room
    return Axis(low, high, write, log)


@dataclass(frozen=True)
class Chart:
    """Lines between two axes, a level across (the target) if there is one, and rings where lines meet it."""

    lines: tuple[Line, ...]
    x: Axis
    y: Axis
    x_label: str
    title: str
    level: float | None = None
    rings: tuple[tuple[int, float, float], ...] = ()
    bands: tuple[Band, ...] = ()

    def draw(self, width: int, height: int, key: str) -> str:
        """The SVG element. ``key`` makes its identifiers unique on the page."""
        frame = _Frame(self, width, height)
        clip = f"clip-{key}"
        parts = [
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(self.title)}">',
            f'<defs><clipPath id="{clip}"><rect x="{LEFT}" y="{TOP - 4}" width="{width - LEFT - RIGHT + 6}" '
            f'height="{height - TOP - BOTTOM + 8}"/></clipPath></defs>',
            *frame.grid(),
            f'<g clip-path="url(#{clip})">',
            *frame.level(),
            *(frame.band(band) for band in self.bands),
            *(frame.line(line) for line in self.lines),
            *(frame.ring(*ring) for ring in self.rings),
            "</g></svg>",
        ]
        return "".join(parts)


class _Frame:
    """A chart at one size."""

    def __init__(self, chart: Chart, width: int, height: int) -> None:
        self._chart = chart
        self._width, self._height = width, height
        self._right, self._bottom = width - RIGHT, height - BOTTOM

    def x(self, value: float) -> float:
        return round(LEFT + self._chart.x.at(value) * (self._right - LEFT), 1)

    def y(self, value: float) -> float:
        return round(self._bottom - self._chart.y.at(value) * (self._bottom - TOP), 1)

    def grid(self) -> list[str]:
        """Tick lines with their values, and the name of what runs to the right."""
        parts = []
        for value in self._chart.y.ticks(5):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{self._right}" y1="{y}" y2="{y}"/>')
            parts.append(_text(LEFT - 8, y + 4, "end", self._chart.y.write(value)))
        for value in self._chart.x.ticks(max(3, self._width // 80)):
            x = self.x(value)
            parts.append(
                f'<line class="tick" x1="{x}" x2="{x}" y1="{self._bottom}" y2="{self._bottom + 4}"/>'
            )
            parts.append(_text(self._inside(x), self._bottom + 18, "middle", self._chart.x.write(value)))
        parts.append(
            f'<line class="axis" x1="{LEFT}" x2="{self._right}" y1="{self._bottom}" y2="{self._bottom}"/>'
        )
        parts.append(_text(self._right, self._height - 6, "end", self._chart.x_label, "name"))
        return parts

    def _inside(self, x: float) -> float:
        """Far enough from the right edge that half a label fits."""
        return min(x, self._width - 22)

    def level(self) -> list[str]:
        if self._chart.level is None:
            return []
        y = self.y(self._chart.level)
        return [f'<line class="level" x1="{LEFT}" x2="{self._right}" y1="{y}" y2="{y}"/>']

    def line(self, line: Line) -> str:
        """The line and its markers, in one group that can be brought forward."""
        points = [(self.x(x), self.y(y)) for x, y in line.points]
        path = "M" + "L".join(f"{x} {y}" for x, y in points)
        marks = "".join(marker(line.style, *points[at]) for at in _marked(len(points), line.style))
        label = f"<title>{escape(line.label)}</title>"
        return (
            f'<g class="line s{line.style % COLOURS}" data-style="{line.style}">{label}'
            f'<path class="stroke" d="{path}"/>{marks}</g>'
        )

    def band(self, band: Band) -> str:
        """The area over which runs spread, below their mean's line."""
        top = [(self.x(x), self.y(high)) for x, _, high in band.points]
        bottom = [(self.x(x), self.y(low)) for x, low, _ in reversed(band.points)]
        path = "M" + "L".join(f"{x} {y}" for x, y in top + bottom)
        return f'<path class="band s{band.style % COLOURS}" data-style="{band.style}" d="{path}"/>'

    def ring(self, style: int, x: float, y: float) -> str:
        return (
            f'<circle class="ring s{style % COLOURS}" data-style="{style}" '
            f'cx="{self.x(x)}" cy="{self.y(y)}" r="7.5"/>'
        )


def marker(style: int, x: float, y: float) -> str:
    """A shape that tells styles apart without colour: circle, square, triangle, diamond and so on."""
    sides, rotation = ((0, 0.0), (4, 0.25), (3, 0.5), (4, 0.0), (3, 0.0), (5, 0.5), (6, 0.0))[style % 7]
    if sides == 0:
        return f'<circle class="mark" cx="{x}" cy="{y}" r="3.6"/>'
    corners = []
    for side in range(sides):
        angle = math.tau * (
            side / sides + rotation / sides * (1 if sides == 3 else 2) + (0.25 if sides != 4 else 0)
        )
        corners.append(f"{x + 4.6 * math.cos(angle):.1f},{y + 4.6 * math.sin(angle):.1f}")
    return f'<polygon class="mark" points="{" ".join(corners)}"/>'


def swatch(style: int) -> str:
    """A short piece of a line for a legend."""
    return (
        f'<svg class="swatch s{style % COLOURS}" viewBox="0 0 34 12" width="34" height="12" '
        'aria-hidden="true">'
        f'<path class="stroke" d="M2 6L32 6"/>{marker(style, 17, 6)}</svg>'
    )


def _marked(count: int, style: int) -> list[int]:
    """Which points get a marker: evenly spread, shifted from line to line, and always the last."""
    every = max(1, math.ceil(count / MARKS))
    return sorted({*range(style % every, count, every), count - 1}) if count else []


def _text(x: float, y: float, anchor: str, text: str, kind: str = "value") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _linear_ticks(low: float, high: float, wanted: int) -> list[float]:
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(multiple * power for multiple in (1, 2, 5, 10) if multiple * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{at * step:.12g}") for at in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, wanted: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [f * 10.0**power for power in powers for f in factors if low <= f * 10.0**power <= high]
        if len(ticks) <= wanted:
            return ticks
    return ticks[:: math.ceil(len(ticks) / wanted)]
