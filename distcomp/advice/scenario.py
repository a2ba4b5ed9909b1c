"""What goes wrong while a thousand workers train: stragglers, and links that fail. As a file it is TOML::

    seed = 0                      # of the draws below
    compute = "20ms"              # of a step, on a worker that nothing slows down

    [stragglers]                  # in every step, each worker is slow with this chance, by this factor
    chance = 0.05
    factor = 10

    [[slow]]                      # workers that are always slow
    ranks = [3, 17]
    factor = 2.5

    [failures]                    # each worker dies with this chance an hour; a new one joins so much later
    per_hour = 0.01
    replaced = "600s"

    [[down]]                      # a link fails, in virtual time
    ranks = [5]
    begin = "10s"
    end = "30s"

While its link is down a worker computes and is not heard. Gossip with ``on_failure=continue`` that keeps no
replicas goes on without it; whatever else is asked of it waits until the link is back. Failures are of outer
rounds alone (:mod:`distcomp.advice.rounds`).
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcomp.errors import DistcompError
from distcomp.network.units import parse_time


@dataclass(frozen=True)
class Slow:
    """Workers that always compute ``factor`` times as long."""

    ranks: tuple[int, ...]
    factor: float


@dataclass(frozen=True)
class Down:
    """Workers that are not heard from ``begin_s`` to ``end_s``."""

    ranks: tuple[int, ...]
    begin_s: float
    end_s: float


@dataclass(frozen=True)
class Scenario:
    """How long a step computes on each worker, and which links fail when."""

    compute_s: float = 0.0
    seed: int = 0
    straggler_chance: float = 0.0
    straggler_factor: float = 1.0
    slow: tuple[Slow, ...] = ()
    down: tuple[Down, ...] = ()
    failures_per_hour: float = 0.0
    replaced_s: float = 600.0

    def computing_s(self, step: int, workers: int) -> NDArray[np.float64]:
        """Each worker's time for the computing of a step; the same whenever it is asked for."""
        times = np.full(workers, self.compute_s)
        for slow in self.slow:
            times[list(slow.ranks)] *= slow.factor
        drawn = np.random.default_rng((self.seed, step)).random(workers)
        times[drawn < self.straggler_chance] *= self.straggler_factor
        return times

    def back_s(self, rank: int, moment_s: float) -> float:
        """When a worker's link is there: now, or when it comes back."""
        for outage in sorted(self.down, key=lambda outage_: outage_.begin_s):
            if rank in outage.ranks and outage.begin_s <= moment_s < outage.end_s:
                moment_s = outage.end_s
        return moment_s

    def check(self, workers: int) -> None:
        """Raise DistcompError where a worker is named that there is none of."""
        named = [rank for slow in self.slow for rank in slow.ranks]
        named += [rank for outage in self.down for rank in outage.ranks]
        for rank in named:
            if not 0 <= rank < workers:
                raise DistcompError(f"the scenario names worker {rank}; there are 0 to {workers - 1}")

    @classmethod
    def from_toml(cls, path: Path) -> Scenario:
        """The scenario in a file. Raises DistcompError where it cannot be read or makes no sense."""
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise DistcompError(f"the scenario {path} cannot be read ({error}); give a TOML file") from None
        try:
            return cls._of(table)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DistcompError(
                f"{path}: {error!r} is missing or of another kind; see docs/advice.md"
            ) from None

    @classmethod
    def _of(cls, table: dict[str, Any]) -> Scenario:
        unknown = set(table) - {"seed", "compute", "stragglers", "slow", "down", "failures"}
        if unknown:
            raise DistcompError(
                f"a scenario has no setting {min(unknown)!r}; see docs/advice.md for those it has"
            )
        stragglers = table.get("stragglers", {"chance": 0.0, "factor": 1.0})
        chance, factor = float(stragglers["chance"]), float(stragglers["factor"])
        if not 0 <= chance <= 1 or factor <= 0:
            raise DistcompError(
                f"stragglers have a chance in [0, 1] and a factor above 0, not {chance}, {factor}"
            )
        failures = table.get("failures", {"per_hour": 0.0, "replaced": 600.0})
        per_hour, replaced_s = float(failures["per_hour"]), parse_time(failures["replaced"])
        if not 0 <= per_hour < 1:
            raise DistcompError(f"failures have a chance an hour in [0, 1), not {per_hour}")
        return cls(
            parse_time(table.get("compute", 0.0)),
            int(table.get("seed", 0)),
            chance,
            factor,
            tuple(
                Slow(tuple(map(int, entry["ranks"])), float(entry["factor"]))
                for entry in table.get("slow", [])
            ),
            tuple(
                Down(tuple(map(int, entry["ranks"])), parse_time(entry["begin"]), parse_time(entry["end"]))
                for entry in table.get("down", [])
            ),
            per_hour,
            replaced_s,
        )
