"""How seconds are written in advice, and what is worth advising."""

from __future__ import annotations

WORTH = 1.05
"""What is not by so much faster than what it replaces, plain DDP or FSDP2 or the buckets there are, is not
worth what it changes."""


def milliseconds(time_s: float) -> str:
    """Three digits, never in powers of ten."""
    value = 1e3 * time_s
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"
