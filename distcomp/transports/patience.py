"""How long is one waited for who is alive? As long as it waits itself; ``timeout_s`` where it does not.

Were everybody waited for equally long, one slow rank would end all others: its neighbours give it up at the
moment at which their own neighbours give *them* up. So ranks say on the notice boards whether they wait, and
in which exchange. Who waits in an earlier exchange than one's own is waiting for somebody further behind, who
is waiting for somebody further behind still: the last of them computes, or does not answer, and is given up
by its neighbours after ``timeout_s``. Every wait ends.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from distcomp.transports.heartbeat import Heartbeat
from distcomp.transports.verdict import Findings

NEIGHBOURS, EVERYONE = "neighbours", "everyone"
"""What a rank may wait for."""

LOOK_S = 2.0
"""So often one looks who is worth waiting for; longer than a heartbeat's interval."""

DEAD = "died or hangs"
LEFT = "has ended or detached"


@dataclass
class Patience:
    """With the ranks that one waits for in exchange ``number``, from now on."""

    heartbeat: Heartbeat
    number: int
    waits_for: str
    timeout_s: float

    begin_s: float = field(default_factory=time.monotonic)
    _begun: dict[int, int] = field(default_factory=dict)

    def lost(self, ranks: Iterable[int]) -> dict[int, str]:
        """Those of ``ranks`` that are worth no more waiting, and why."""
        found = self.heartbeat.look()
        reasons = {rank: self._reason(rank, found) for rank in ranks}
        return {rank: reason for rank, reason in reasons.items() if reason is not None}

    def _reason(self, rank: int, found: Findings) -> str | None:
        if rank in found.gone | found.silent:
            return DEAD
        if rank in found.left:
            return LEFT
        begun, doing = (0, "") if found.deaf else (found.begun[rank], found.doing[rank])
        crosses = begun == self.number and doing not in ("", self.waits_for)
        if self.waits_for == EVERYONE and (crosses or begun > self.number):
            return "trains on"
        if crosses:
            return "averages or detaches"
        moved = self._begun.get(rank) != begun
        self._begun[rank] = begun
        if time.monotonic() - self.begin_s < self.timeout_s:
            return None
        if begun < self.number and (doing or moved):
            return None
        return f"did not answer within timeout_s={self.timeout_s:g}, although alive"
