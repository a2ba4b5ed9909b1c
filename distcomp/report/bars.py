"""Bars and the timeline of a step, as inline SVG. Colours are the style sheet's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

ROW, BAR = 46, 18
LANE = 12
CHARACTER = 7.0
"""Pixels of a character at 12 px, at most."""


def stacked(
    rows: Sequence[tuple[str, Mapping[str, float]]],
    styles: Mapping[str, str],
    write: Callable[[float], str],
    title: str,
    width: int,
) -> str:
    """A bar per row, its name above it, as long as its parts; ``styles``: part -> CSS class."""
    longest = max(sum(parts.values()) for _, parts in rows) or 1.0
    room = width - max(len(write(sum(parts.values()))) for _, parts in rows) * CHARACTER - 16
    body = []
    for at, (name, parts) in enumerate(rows):
        top, x = at * ROW + 20, 0.0
        body.append(_text(0, top - 6, "start", cut_to_width(name, width), "bar-title"))
        for part, value in parts.items():
            wide = room * value / longest
            if value > 0:
                told = escape(f"{part}: {write(value)}")
                body.append(
                    f'<rect class="{styles[part]}" x="{x:.1f}" y="{top}" width="{max(wide, 0.5):.1f}" '
                    f'height="{BAR}"><title>{told}</title></rect>'
                )
            x += wide
        body.append(_text(x + 8, top + 13, "start", write(sum(parts.values()))))
    return _svg(width, len(rows) * ROW, title, body)


@dataclass(frozen=True)
class Stretch:
    """What was done with a bucket in a round, in seconds from the first moment."""

    phase: str
    bucket: int
    round: int
    begin_s: float
    end_s: float


def timeline(spans: Sequence[Stretch], ready_s: float | None, title: str, width: int) -> str:
    """A row per bucket: what the processor did above, what was on the wire below."""
    left = 62
    buckets = sorted({one.bucket for one in spans})
    last_s = max(one.end_s for one in spans) or 1.0
    scale = (width - left - 14) / last_s
    height = len(buckets) * (2 * LANE + 10) + 44
    body = []
    for value in _ticks(last_s, 3 if width < 500 else 6):
        x = left + value * scale
        body.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 38}"/>')
        body.append(_text(min(x, width - 20), height - 22, "middle", f"{1e3 * value:g}"))
    body.append(_text(width - 4, height - 6, "end", "milliseconds from the first encode", "name"))
    for at, bucket in enumerate(buckets):
        y = 6 + at * (2 * LANE + 10)
        body.append(_text(left - 8, y + LANE + 4, "end", f"bucket {bucket}"[: 8 if width < 500 else 12]))
        for one in (one for one in spans if one.bucket == bucket):
            lane = y + LANE + 1 if one.phase == "wire" else y
            wide = max((one.end_s - one.begin_s) * scale, 0.7)
            took = f"{1e3 * (one.end_s - one.begin_s):.3g} ms"
            told = f"bucket {bucket}, round {one.round + 1}: {one.phase} {took}"
            body.append(
                f'<rect class="{one.phase}" x="{left + one.begin_s * scale:.1f}" y="{lane}" '
                f'width="{wide:.1f}" height="{LANE}"><title>{escape(told)}</title></rect>'
            )
            if one.phase == "wire" and wide > 12:
                x = left + one.begin_s * scale + wide / 2
                body.append(_text(x, lane + 9.5, "middle", f"{one.round + 1}", "round"))
    if ready_s is not None and ready_s <= last_s:
        x = left + ready_s * scale
        body.append(f'<line class="level" x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="{height - 38}"/>')
    return _svg(width, height, title, body)


def cut_to_width(name: str, width: int) -> str:
    """A name that may be too long for the drawing, cut at its end."""
    most = int(width / CHARACTER) - 1
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _svg(width: int, height: int, title: str, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg>'
    )


def _text(x: float, y: float, anchor: str, text: str, kind: str = "value") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _ticks(last: float, wanted: int) -> list[float]:
    power = 10.0
    while power > last / wanted:
        power /= 10
    step = next(power * multiple for multiple in (1, 2, 5, 10) if power * multiple >= last / wanted)
    return [at * step for at in range(int(last / step) + 1)]
