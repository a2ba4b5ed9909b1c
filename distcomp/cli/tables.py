"""Tables that fit where they are shown: in columns, or one paragraph per row where those are too wide."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence

GAP = "  "


def fitted(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column begins each line and is never cut; the others stand to the right. On a terminal that
    is too narrow every row becomes a paragraph; in a pipe or a file nothing is."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    if not sys.stdout.isatty() or sum(widths) + len(GAP) * (len(widths) - 1) <= terminal_columns():
        return "\n".join(_aligned(line, widths) for line in (head, *rows))
    named = max(map(len, head[1:]), default=0)
    return "\n\n".join(
        "\n".join(
            [name, *(f"  {title:<{named}}  {cell}" for title, cell in zip(head[1:], cells, strict=True))]
        )
        for name, *cells in rows
    )


def sentence(text: str) -> str:
    """Broken between words where a terminal would break it anywhere."""
    return textwrap.fill(text, terminal_columns(), break_long_words=False) if sys.stdout.isatty() else text


def terminal_columns() -> int:
    """How wide the terminal is."""
    return shutil.get_terminal_size().columns


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = line
    cells = [first.ljust(widths[0])]
    cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
    return GAP.join(cells).rstrip()
