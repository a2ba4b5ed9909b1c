"""MLflow: what each step took and sent, as metrics of a run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from distcomp.errors import require
from distcomp.recording import scalars


class MLflow:
    """A sink for ``handle.watch``: every number of a record as the metric ``distcomp/<name>``.

    Each rank has a run of its own in ``experiment``, or logs into the run whose ``run_id`` you give, which
    stays yours to end: give that on one rank only. ``uri`` is the tracking server's, or MLflow's own default.
    """

    def __init__(
        self, experiment: str = "distcomp", run_id: str | None = None, uri: str | None = None
    ) -> None:
        self._mlflow = require("mlflow", "mlflow")
        self._experiment, self._run_id, self._own = experiment, run_id, run_id is None
        self._client = self._mlflow.MlflowClient(tracking_uri=uri)

    def begin(self, rank: int, size: int) -> None:
        """Open this rank's run; ``handle.watch`` calls it."""
        if self._own:
            try:
                experiment = self._client.create_experiment(self._experiment)
            except self._mlflow.MlflowException:  # it is there already, or another rank was first
                experiment = self._client.get_experiment_by_name(self._experiment).experiment_id
            self._run_id = self._client.create_run(experiment, run_name=f"rank{rank}").info.run_id

    def __call__(self, record: Mapping[str, Any]) -> None:
        metric, now_ms = self._mlflow.entities.Metric, int(time.time() * 1000)
        named = [(f"distcomp/{name}", value) for name, value in scalars(record).items()]
        self._client.log_batch(self._run_id, [metric(*one, now_ms, record["step"]) for one in named])

    def close(self) -> None:
        """End the run, if it is the sink's own."""
        if self._own and self._run_id is not None:
            self._client.set_terminated(self._run_id)
