"""What may be said of a comparison in one sentence, and when nothing may be said."""

from __future__ import annotations

import math
from dataclasses import dataclass

from distcomp.recording import Run
from distcomp.report import words
from distcomp.report.figures import Comparison, MethodRow

MARGIN = 2.0
"""A difference is told from chance where it is so many times as large as what runs of a method differ by."""
LEAST = 0.02
"""And never where it is smaller than this, however much alike two runs happened to be."""
TOLERANCE = 0.1
"""A link holds its rate where both measurements of the self-test are so near to it."""


@dataclass(frozen=True)
class Verdict:
    """A sentence, and the method that it recommends, if it does."""

    sentence: str
    winner: MethodRow | None = None


def verdict(comparison: Comparison) -> Verdict:
    """Which method reaches the target soonest, if that is known: not over a network that failed its
    self-test, not where the baseline ran once, and not below the noise."""
    best, base = comparison.best, comparison.baseline
    if best is None or best.speed_up is None or base is None:
        alone = len(comparison.rows) == 1
        return Verdict(
            f"{comparison.rows[0].method}: what it took and sent" if alone else "Methods side by side"
        )
    off = [sentence for run in comparison.runs if (sentence := off_rate(run))]
    if off:
        return Verdict(f"No method is called faster: the network did not hold its rate ({off[0]})")
    noise = comparison_noise(comparison)
    if noise is None:
        return Verdict("No method is called faster: DDP ran once, so what is chance is not known")
    factor = f"{words.formatted(best.speed_up, words.number)} times"
    if abs(math.log(best.speed_up)) <= math.log1p(max(LEAST, MARGIN * noise)):
        return Verdict(
            f"No difference beyond chance: {best.method} is {factor} as fast as DDP, and runs of one method "
            f"differ by {words.formatted(noise, words.percent)}"
        )
    if best.speed_up < 1:
        return Verdict(
            f"Plain DDP is fastest on this network: {best.method} has {factor} its speed to "
            f"{goal(comparison)}"
        )
    return Verdict(
        f"{best.method} reaches {goal(comparison)} {factor} sooner than DDP{_how(best, base)}", winner=best
    )


def goal(comparison: Comparison) -> str:
    """The test loss that counts, and where it is from."""
    source = "as was asked" if comparison.target_given else "DDP's last one and 5 %"
    return f"a test loss of {words.formatted(comparison.target_loss or 0.0, words.loss)} ({source})"


def comparison_noise(comparison: Comparison) -> float | None:
    """By what share runs of one method differ in their seconds to the target: the most of all methods. None
    where the baseline has no second run."""
    base = comparison.baseline
    if base is None or base.to_target_s is None or len(base.runs) < 2:
        return None
    return max(_range(row, comparison) for row in comparison.rows if row.to_target_s is not None)


def _range(row: MethodRow, comparison: Comparison) -> float:
    points = [run.reached(comparison.target_loss or 0.0) for run in row.runs]
    times_s = [point.train_s for point in points if point is not None]
    middle_s = sum(times_s) / len(times_s)
    return (max(times_s) - min(times_s)) / middle_s if middle_s > 0 else 0.0


def off_rate(run: Run) -> str | None:
    """What was achieved, where the self-test missed the rate of a link by more than a tenth."""
    network = run.about.get("network") or {}
    for link in network.get("links") or ():
        asked_bps = link.get("asked_bps") or math.inf
        measured = (link.get("achieved_bps"), link.get("after_idle_bps"))
        if math.isfinite(asked_bps) and any(
            bps is not None and abs(bps / asked_bps - 1) > TOLERANCE for bps in measured
        ):
            return str(network.get("achieved") or "see its self-test")
    return None


def _how(best: MethodRow, base: MethodRow) -> str:
    """What a reader would otherwise take for granted."""
    steps = [row.spread("step_s") for row in (best, base)]
    sent = [row.spread("payload_bytes") for row in (best, base)]
    notes = []
    if steps[0] is not None and steps[1] is not None and steps[0].mean > steps[1].mean:
        notes.append("in fewer steps, each of them slower")
    if sent[0] is not None and sent[1] is not None and sent[0].mean > 0.99 * sent[1].mean:
        notes.append("with as many bytes")
    return f", {' and '.join(notes)}" if notes else ""
