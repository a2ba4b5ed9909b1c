"""What the fuzzers share: a limit on memory, a count of what became of each input, and the result file."""

from __future__ import annotations

import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks._common import write

LIMIT_BYTES = 8 << 30
"""Of addresses, for the whole process: what asks for more gets a MemoryError, which is a crash."""


class Tally:
    """``attempt(input)`` names what became of an input; whatever it raises is a crash, which is printed."""

    def __init__(self, attempt: Callable[..., str], *outcomes: str) -> None:
        self._attempt = attempt
        self.became: Counter[str] = Counter(dict.fromkeys((*outcomes, "crashed"), 0))
        self.slowest_s = 0.0

    def feed(self, *given: Any) -> None:
        """Try one input."""
        began_s = time.perf_counter()
        try:
            self.became[self._attempt(*given)] += 1
        except Exception:
            self.became["crashed"] += 1
            print(repr(given)[:2000], traceback.format_exc(), sep="\n", file=sys.stderr)
        self.slowest_s = max(self.slowest_s, time.perf_counter() - began_s)

    def result(self) -> dict[str, Any]:
        """The counts, and what the slowest input took."""
        return {"inputs": sum(self.became.values()), **self.became, "slowest_s": self.slowest_s}

    def check(self, what: str) -> None:
        """End with a failure where something crashed."""
        if self.became["crashed"]:
            raise SystemExit(f"{self.became['crashed']} {what}; they are printed above")


def peak_bytes() -> int:
    """The most memory that this process has had so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def fuzz(name: str, tally: Tally, cases: Iterable[tuple[Any, ...]], seed: int) -> None:
    """Feed all cases under the limit; write ``results/<name>.json``; fail where one crashed."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    for case in cases:
        tally.feed(*case)
    result = {**tally.result(), "limit_bytes": LIMIT_BYTES, "peak_bytes": peak_bytes()}
    print(result)
    write(name, result, seed)
    tally.check("inputs crashed")
