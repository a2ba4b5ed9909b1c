"""Prometheus: a text file that node_exporter's textfile collector reads."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distcomp.errors import require


class Prometheus:
    """A sink for ``handle.watch`` that keeps ``path`` (``*.prom``) up to date, whole at every moment.

    Each rank writes a file of its own, ``distcomp-rank1.prom`` for ``distcomp.prom``, and labels every series
    with its ``rank``; with a ``rank`` among your own ``labels`` the path is taken as it is. Counters:
    ``distcomp_steps_total``, ``distcomp_sent_bytes_total`` by kind of payload, ``distcomp_seconds_total`` by
    phase. Gauges: ``distcomp_step_seconds`` of the last step, ``distcomp_metric`` by name of what
    ``handle.log`` was told. The file is written every ``every_s`` seconds at most, and on ``detach``.
    """

    def __init__(self, path: str | Path, every_s: float = 5.0, **labels: str) -> None:
        require("prometheus_client", "prometheus")
        self._path = Path(path)
        self._every_s = every_s
        self._written_s = float("-inf")
        self._labels = labels
        if "rank" in labels:
            self._make()

    def begin(self, rank: int, size: int) -> None:
        """Which rank this is; ``handle.watch`` calls it."""
        if "rank" not in self._labels:
            self._labels = {"rank": str(rank), **self._labels}
            if size > 1:
                self._path = self._path.with_stem(f"{self._path.stem}-rank{rank}")
            self._make()

    def _make(self) -> None:
        client = require("prometheus_client", "prometheus")
        labels = self._labels
        self._registry: Any = client.CollectorRegistry()
        self._write: Any = client.write_to_textfile

        def make(kind: Any, name: str, documentation: str, *by: str) -> Any:
            return kind(f"distcomp_{name}", documentation, [*labels, *by], registry=self._registry)

        self._steps = make(client.Counter, "steps", "Iterations exchanged")
        self._sent = make(client.Counter, "sent_bytes", "Payload bytes sent", "kind")
        self._seconds = make(client.Counter, "seconds", "Time in each phase of the exchange", "phase")
        self._step = make(client.Gauge, "step_seconds", "Length of the last step")
        self._metric = make(client.Gauge, "metric", "What the script logged last", "name")

    def __call__(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "step":
            self._steps.labels(**self._labels).inc()
            self._step.labels(**self._labels).set(record["step_s"] or float("nan"))
            for kind, sent_bytes in record["payload_by_kind"].items():
                self._sent.labels(**self._labels, kind=kind).inc(sent_bytes)
            for phase, seconds in record["phases"].items():
                self._seconds.labels(**self._labels, phase=phase.removesuffix("_s")).inc(seconds)
        else:
            for name, value in record.items():
                if name not in ("kind", "step") and isinstance(value, int | float):
                    self._metric.labels(**self._labels, name=name).set(value)
        if time.monotonic() - self._written_s >= self._every_s:
            self.close()

    def close(self) -> None:
        """Write the file now."""
        self._write(str(self._path), self._registry)
        self._written_s = time.monotonic()
