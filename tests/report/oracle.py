"""What the table must say, worked out from the records a second time with NumPy and nothing of distcomp."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

Records = dict[int, list[dict[str, Any]]]
"""Each rank's records, in order."""


def steps_of(run: Records, rank: int) -> list[dict[str, Any]]:
    return [one for one in run[rank] if one["kind"] == "step"]


def metrics_of(run: Records) -> list[dict[str, Any]]:
    return [one for one in run[0] if one["kind"] == "metric"]


def mean_or_none(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def payload_bytes(run: Records) -> float | None:
    return mean_or_none(
        [
            one["payload_bytes"]
            for rank in run
            for one in steps_of(run, rank)
            if one["payload_bytes"] is not None
        ]
    )


def wire_bytes(run: Records) -> float | None:
    by_rank = []
    for rank in run:
        counts = [one["qdisc_bytes"] for one in steps_of(run, rank)]
        rises = [b - a for a, b in itertools.pairwise(counts) if None not in (a, b) and b >= a]
        if rises:
            by_rank.append(float(np.mean(rises)))
    return mean_or_none(by_rank)


def step_s(run: Records) -> float | None:
    times = [one["step_s"] for one in steps_of(run, 0)]
    times = times[1:] if len(times) > 1 else times
    there = [one for one in times if one is not None]
    return float(np.median(there)) if there else None


def last(run: Records, name: str) -> float | None:
    values = [one[name] for one in metrics_of(run) if one[name] is not None]
    return values[-1] if values else None


def default_target(baselines: list[Records]) -> float | None:
    finals = [final for run in baselines if (final := last(run, "test_loss")) is not None]
    if not finals or not np.isfinite(np.mean(finals)):
        return None
    return float(np.mean(finals) + 0.05 * abs(np.mean(finals)))


def starting_s(run: Records) -> float:
    first, *later = [one["step_s"] for one in steps_of(run, 0)]
    there = [one for one in later if one is not None]
    return max(0.0, first - float(np.median(there))) if there and first is not None else 0.0


def to_target_s(run: Records, target: float | None) -> float | None:
    for one in metrics_of(run):
        if target is not None and one["test_loss"] is not None and one["test_loss"] <= target:
            began = one["train_s"] >= (steps_of(run, 0)[0]["step_s"] or 0.0)
            return float(one["train_s"]) - (starting_s(run) if began else 0.0)
    return None


def spread(values: list[float | None]) -> dict[str, Any] | None:
    if not values or None in values:
        return None
    array = np.array(values, dtype=float)
    deviation = float(np.std(array, ddof=1)) if len(array) > 1 and np.isfinite(array).all() else 0.0
    mean = float(np.mean(array))
    return {"mean": mean if np.isfinite(mean) else str(mean), "deviation": deviation}
