"""What the record of a run says, as series of numbers with labels: what a monitoring system collects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

SERIES: dict[str, tuple[str, ...]] = {
    "steps": ("Counter", "Iterations exchanged"),
    "sent_bytes": ("Counter", "Payload bytes sent", "kind"),
    "seconds": ("Counter", "Time in each phase of the exchange", "phase"),
    "step_seconds": ("Gauge", "Length of the last step"),
    "metric": ("Gauge", "What the script logged last", "name"),
}
"""Name -> Counter (amounts add up) or Gauge (the last one stands), what it says, its label if it has one."""


def amounts_of(record: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, str], float]]:
    """(name of the series, its label, amount) of all that a record says."""
    if record["kind"] != "step":
        for name, value in record.items():
            if name not in ("kind", "step") and isinstance(value, int | float):
                yield "metric", {"name": name}, value
        return
    yield "steps", {}, 1
    yield "step_seconds", {}, record["step_s"] or float("nan")  # the first: where it began is unknown
    for kind, sent_bytes in record["payload_by_kind"].items():
        yield "sent_bytes", {"kind": kind}, sent_bytes
    for phase, seconds in record["phases"].items():
        yield "seconds", {"phase": phase.removesuffix("_s")}, seconds
