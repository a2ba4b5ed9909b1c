"""What an outer round does about workers that are late, lost or new."""

from __future__ import annotations

import math
from dataclasses import dataclass

from distcomp.errors import DistcompError
from distcomp.grammar import checked, read_settings, split_call

STOP, CONTINUE = "stop", "continue"
DOWNLOADS = ("plain", "lossless")
LATE_ROUNDS = 1
"""By so many rounds a contribution may be late and is still used, in the round after."""


@dataclass(frozen=True)
class Lateness:
    """The outer step goes on with those who come: ``continue:quorum=3,grace_s=30``.

    ::

        a round closes     when all who are expected have come, or ``grace_s`` after the ``quorum``-th came
        anchor             = outer(anchor, sum_i w_i Delta_i / sum_i w_i)      i: who came; w_i: what it saw
        who missed one     x_i = anchor + (x_i - old anchor): what it learnt is in its next contribution
        who missed more    x_i = anchor: what it learnt is dropped

    Fewer than ``quorum`` within the timeout are an error. ``download``: how a worker that joins, or comes
    back, is handed the anchor and the outer optimizer's state: ``plain`` float32, or ``lossless``, coded byte
    by byte. Nothing lossy: its anchor would differ from the others' for good.

    Source: Douillard et al., "Decoupled DiLoCo for resilient distributed pre-training", 2026 (quorum, grace
    window, weights by tokens). We differ: no synchronizer, every worker takes the outer step; the window is
    fixed; weights are tokens alone; what is one round late is carried, as eager updates are.

    Raises DistcompError for a quorum below 1, a window below 0, or another download.
    """

    quorum: int = 1
    grace_s: float = 60.0
    download: str = "plain"

    def __post_init__(self) -> None:
        if self.quorum < 1 or not 0 <= self.grace_s < math.inf or self.download not in DOWNLOADS:
            raise DistcompError(
                "a quorum is 1 worker at least, grace_s 0 seconds or more and download "
                f"{' or '.join(DOWNLOADS)}, not {self.quorum}, {self.grace_s:g} and {self.download!r}"
            )


def lateness_of(on_failure: str) -> Lateness | None:
    """What ``on_failure`` says: None to stop.

    Raises DistcompError for another text.
    """
    name, texts = split_call(on_failure, "on_failure")
    if name == STOP and not texts:
        return None
    if name != CONTINUE:
        raise DistcompError(f"on_failure is 'stop' or 'continue', not {on_failure!r}")
    return Lateness(**checked(name, read_settings(name, texts, Lateness), Lateness))
