"""What the notice boards say together, and the sentence that it comes to: the same one on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from distcomp.transports.board import GONE, LEFT

REMEDY = "restart from the last checkpoint"


@dataclass
class Findings:
    """What is known of the other ranks."""

    notes: list[str] = field(default_factory=list)
    """What was said by those who stopped."""
    gone: set[int] = field(default_factory=set)
    """Their connections have ended without a goodbye."""
    left: set[int] = field(default_factory=set)
    silent: set[int] = field(default_factory=set)
    """No board has heard them for a while."""
    behind: dict[int, int] = field(default_factory=dict)
    """Alive, and with fewer exchanges begun than others: how many."""
    furthest: int = 0
    """The most exchanges that a rank has begun."""
    deaf: bool = False
    """No board answers."""

    @staticmethod
    def of(answers: Sequence[dict[str, Any]], rank: int, size: int, silence_s: float) -> Findings:
        """Merge the answers of boards: heard by one is heard."""
        findings = Findings(list(dict.fromkeys(note for answer in answers for note in answer["notes"])))
        views = [answer["view"] for answer in answers]
        begun = []
        for other in range(size):
            seen = [view[other] for view in views]
            begun.append(max(at for _, _, at in seen))
            states = {state for _, state, _ in seen}
            if other == rank:
                continue
            if LEFT in states:
                findings.left.add(other)
            elif GONE in states:
                findings.gone.add(other)
            elif min(age_s for age_s, _, _ in seen) > silence_s:
                findings.silent.add(other)
        findings.furthest = max(begun)
        there = [
            rank_ for rank_ in range(size) if rank_ not in findings.left | findings.gone | findings.silent
        ]
        least = min(begun[rank_] for rank_ in there)
        if least < findings.furthest:
            findings.behind = {rank_: least for rank_ in there if begun[rank_] == least}
        return findings


def diagnosis(findings: Findings, rank: int, size: int, silence_s: float, timeout_s: float) -> str:
    """One sentence that names ranks and a reason."""
    if findings.deaf or (size > 2 and len(findings.silent) == size - 1):
        return (
            f"rank {rank} hears no other rank: its network is cut, or all others died "
            f"(no heartbeat for {silence_s:g} s)"
        )
    sentences = []
    if findings.gone:
        sentences.append(f"{ranks(findings.gone)} died or hangs (its connections were closed)")
    if findings.silent:
        sentences.append(f"{ranks(findings.silent)} died or hangs (no heartbeat for {silence_s:g} s)")
    if sentences:
        return "; ".join(sentences)
    if findings.left:
        return f"{ranks(findings.left)} ended or detached while others still exchange"
    if findings.behind:
        return (
            f"{ranks(findings.behind)} did not come to an exchange within timeout_s={timeout_s:g}, although "
            f"alive: {min(findings.behind.values())} exchanges begun, others {findings.furthest}; if it only "
            "computes longer, give distcomp.attach a longer timeout_s"
        )
    return (
        f"an exchange did not end within timeout_s={timeout_s:g} although every rank is alive and takes "
        "part: the network between them is cut or too slow for it; give distcomp.attach a longer timeout_s"
    )


def ranks(numbers: Iterable[int]) -> str:
    """``rank 1``, or ``ranks 1, 2``."""
    listed = sorted(numbers)
    return ("rank " if len(listed) == 1 else "ranks ") + ", ".join(map(str, listed))
