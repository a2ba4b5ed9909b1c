"""A figure on the page with what it takes away: the drawing as SVG and its numbers as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from html import escape

WIDE, NARROW = (540, 320), (358, 270)

Draw = Callable[[int, int, str], str]
"""Width, height and a key that makes identifiers unique -> an SVG element."""


def figure(
    title: str, draw: Draw, key: str, numbers: str, note: str = "", after: str = "", full: bool = False
) -> str:
    """Drawn for wide and for narrow screens, of which one is shown. ``full``: as wide as the page."""
    sizes = ((1100, NARROW[1]), NARROW) if full else (WIDE, NARROW)
    wide, narrow = draw(*sizes[0], f"{key}-wide"), draw(*sizes[1], key)
    small = f" <small>{note}</small>" if note else ""
    return (
        f"<figure{' class=' + chr(34) + 'full' + chr(34) if full else ''}>"
        f"<figcaption><span>{escape(title)}{small}</span>{buttons(title)}</figcaption>"
        f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
        f'<template class="numbers">{escape(numbers)}</template>{after}</figure>'
    )


def buttons(title: str) -> str:
    """What saves the drawing and the numbers; shown where scripts run."""
    return f'<span class="export">{_button(title, "svg")}{_button(title, "csv")}</span>'


def _button(title: str, kind: str) -> str:
    label = escape(f"{title}, save as {kind.upper()}")
    return f'<button type="button" data-save="{kind}" aria-label="{label}">{kind.upper()}</button>'


def as_csv(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Numbers with six digits, as text that every spreadsheet reads."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        writer.writerow([f"{one:.6g}" if isinstance(one, float) else one for one in row])
    return file.getvalue()
