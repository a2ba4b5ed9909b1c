"""How long has this rank trained? Evaluations and whatever else a script does between two steps left out."""

from __future__ import annotations

import time
from collections.abc import Callable


class TrainingTime:
    """Seconds from the forward of one step to the forward of the next; where something other than training
    came between (an evaluation, a line of metrics), up to the end of the step only."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._counted_s = 0.0
        self._since_s: float | None = None
        self._stepped_s: float | None = None
        self._interrupted = False

    @property
    def seconds(self) -> float:
        """Up to the end of the last step that was finished."""
        if self._since_s is None or self._stepped_s is None:
            return self._counted_s
        return self._counted_s + self._stepped_s - self._since_s

    def forward(self) -> None:
        """A forward that is trained on begins."""
        now_s = self._clock()
        if self._since_s is None:
            self._since_s = now_s
        elif self._stepped_s is not None:
            self._counted_s += (self._stepped_s if self._interrupted else now_s) - self._since_s
            self._since_s, self._stepped_s, self._interrupted = now_s, None, False

    def stepped(self) -> None:
        """The optimizer has stepped."""
        self._stepped_s = self._clock()

    def interrupt(self) -> None:
        """What comes now, until the next forward that is trained on, is not training."""
        self._interrupted = True
