"""What one iteration did, for the record."""

from __future__ import annotations

from dataclasses import dataclass

from distcomp.runtime.pipeline import Timeline


@dataclass(frozen=True)
class Iteration:
    """What one iteration did, for the record."""

    index: int
    timeline: Timeline
    ready_s: float
    """When the last gradient was there: what comes later is exposed."""
    payload_bytes: int
