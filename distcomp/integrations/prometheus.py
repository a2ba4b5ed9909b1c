"""Prometheus: a text file that node_exporter's textfile collector reads."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distcomp.errors import require
from distcomp.integrations.series import SERIES, amounts_of


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
        self._path, self._labels = Path(path), labels
        self._every_s, self._written_s = every_s, float("-inf")
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
        self._registry, self._write = client.CollectorRegistry(), client.write_to_textfile
        self._series: dict[str, Any] = {}
        for name, (kind, says, *own) in SERIES.items():
            labels, make = [*self._labels, *own], getattr(client, kind)
            self._series[name] = make(f"distcomp_{name}", says, labels, registry=self._registry)

    def __call__(self, record: Mapping[str, Any]) -> None:
        for name, own, amount in amounts_of(record):
            series = self._series[name].labels(**self._labels, **own)
            (series.inc if SERIES[name][0] == "Counter" else series.set)(amount)
        if time.monotonic() - self._written_s >= self._every_s:
            self.close()

    def close(self) -> None:
        """Write the file now."""
        self._write(str(self._path), self._registry)
        self._written_s = time.monotonic()
