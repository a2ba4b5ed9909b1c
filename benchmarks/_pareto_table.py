"""What pareto.py's cells say: losses against DDP, bytes, and the steps that DDP's final loss takes."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

from benchmarks._pareto_rows import CONTROL, DDP, EVERY_STEP, MUON, QUARTER, RARE, Row

Found = dict[str, Any]
Runs = dict[int, Found]
"""Seed -> what one run found."""


def table(rows: dict[str, tuple[Row, Runs]], ddp: Runs, steps: int, begun: int) -> dict[str, Found]:
    """A regime's rows by name, from their runs: what :func:`line` says of each.

    ``begun``: of so many of the ``steps`` DDP had been used before. A row with Muon inside is also held
    against DDP with Muon inside, where that is a row.
    """
    quarter = {} if begun else {seed: run["quarter"] for seed, run in ddp.items() if "quarter" in run}
    named = {name: (row.family, runs) for name, (row, runs) in rows.items()}
    named |= {QUARTER: (CONTROL, quarter)}
    share = (steps - begun) / steps
    found = {
        name: {"family": family, **line(runs, ddp, steps, share)}
        for name, (family, runs) in named.items()
        if runs.keys() & ddp.keys()
    }
    _, muon = rows.get(f"{DDP.spec}{MUON}", (DDP, {}))
    for name in found:
        if name.endswith(MUON) and rows[name][1].keys() & muon.keys():
            inside = line(rows[name][1], muon, steps, share)
            found[name]["relative_to_same_inside"] = inside.get("relative")
    return found


def line(runs: Runs, ddp: Runs, steps: int, share: float) -> Found:
    """One row: each loss against DDP's of the same seed; bytes against DDP's in the same ``share`` of the
    steps, and with what DDP sent before."""
    seeds = sorted(seed for seed in runs.keys() & ddp.keys() if "test_loss" in ddp[seed])
    through = [seed for seed in seeds if "test_loss" in runs[seed]]
    found: Found = {"seeds": len(seeds), "diverged": len(seeds) - len(through)}
    if not through:
        return found
    losses = [runs[seed]["test_loss"] for seed in through]
    relative = [runs[seed]["test_loss"] / ddp[seed]["test_loss"] for seed in through]
    sent, all_sent = runs[through[0]]["sent_bytes"], ddp[through[0]]["sent_bytes"]
    found |= {
        "test_loss": losses,
        "mean": statistics.mean(losses),
        "range": [min(losses), max(losses)],
        "relative": relative,
        "relative_loss": statistics.mean(relative),
        "sent_bytes": sent,
        "times_fewer_bytes": share * all_sent / sent if sent else None,
        "times_fewer_in_all": all_sent / (sent + (1 - share) * all_sent) if share < 1 else None,
    }
    if any("longer" in runs[seed] for seed in through):
        more = [more_steps(runs[seed], ddp[seed]["test_loss"], steps) for seed in through]
        found["more_steps"] = more
        found["mean_more_steps"] = None if None in more else statistics.mean(more)
    return found


def more_steps(run: Found, target: float, steps: int) -> float | None:
    """The share of steps beyond ``steps`` that ``run`` needs for ``target``; 0 where it needs none, None
    where the longest run does not reach it."""
    points = [(steps, run["test_loss"])]
    points += [(int(at), one.get("test_loss", math.inf)) for at, one in run.get("longer", {}).items()]
    if points[0][1] <= target:
        return 0.0
    for (begin, above), (end, below) in itertools.pairwise(points):
        if below <= target:
            return (begin + (end - begin) * (above - target) / (above - below)) / steps - 1
    return None


FEWER, LOSS = 85, 1.01
"""At equal steps: at least so many times fewer bytes at no more than this loss against DDP."""
RARE_FEWER, MORE_STEPS = 1000, 0.05
"""Rare: at least so many times fewer bytes, with no more than this share of steps beyond DDP's."""
FAILS = 1.03
"""A control fails from this loss on."""


def verdicts(tables: dict[str, dict[str, Found]]) -> dict[str, list[str]]:
    """By target, the rows that meet it (of controls: that fail, as they should), ``regime | name``."""
    met: dict[str, list[str]] = {"equal steps": [], "every step": [], "rare": [], "controls": []}
    for regime, rows in tables.items():
        for name, row in rows.items():
            if "relative_loss" not in row or name == DDP.spec:
                continue
            fewer, more = row["times_fewer_bytes"] or math.inf, row.get("mean_more_steps")
            if row["family"] != CONTROL and fewer >= FEWER and row["relative_loss"] <= LOSS:
                met["equal steps"].append(f"{regime} | {name}")
                if row["family"] == EVERY_STEP:
                    met["every step"].append(f"{regime} | {name}")
            if row["family"] == RARE and fewer >= RARE_FEWER and more is not None and more <= MORE_STEPS:
                met["rare"].append(f"{regime} | {name}")
            if row["family"] == CONTROL and row["relative_loss"] > FAILS:
                met["controls"].append(f"{regime} | {name}")
    return met
