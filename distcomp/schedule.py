"""When does a number change? A schedule is a value: any rank, width, density or period may be one.

>>> rank = Schedule.parse("8 -> 4 @ 1000 -> 2 @ 5000")     # 8, from step 1000 on 4, from step 5000 on 2
>>> rank(999), rank(1000), rank(9999)
(8.0, 4.0, 2.0)
>>> Schedule.parse("0.25 *> 0.001 @ 500")(250)             # geometric: the same factor in every step
0.015811388300841896
>>> Schedule.parse("4 ~> 8 @ 100")(50)                     # linear
6.0
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise

from distcomp.errors import DistcompError

ARROWS = {"->": "step", "~>": "linear", "*>": "geometric", "^>": "cubic"}
_ARROW = re.compile(r"->|~>|\*>|\^>")


@dataclass(frozen=True)
class Schedule:
    """A number as a function of the step, and of nothing else: a resumed run finds it where it was.

    ``points`` are pairs of a step and the value from there on, in rising order; the first counts from step
    0. Between two points the value holds (``shape="step"``), or runs ``linear`` or ``geometric`` to the
    next, or ``cubic``: fast at first, ``high + (low - high) (1 - part)^3``; after the last it stays.

    Raises DistcompError for no points, steps that do not rise, an unknown shape, or a geometric one through
    zero.
    """

    points: tuple[tuple[int, float], ...]
    shape: str = "step"

    def __post_init__(self) -> None:
        if self.shape not in ARROWS.values():
            raise DistcompError(
                f"a schedule's shape is one of {', '.join(ARROWS.values())}, not {self.shape!r}"
            )
        steps = [step for step, _ in self.points]
        if not steps or steps[0] < 0 or any(a >= b for a, b in pairwise(steps)):
            raise DistcompError(
                f"a schedule's steps must rise from 0, not {steps}; give (step, value) pairs in order"
            )
        if not all(math.isfinite(value) for _, value in self.points):
            raise DistcompError(
                f"a schedule's values must be finite, not {[value for _, value in self.points]}"
            )
        if self.shape == "geometric" and any(value <= 0 for _, value in self.points):
            raise DistcompError("a geometric schedule needs values above zero; use shape='linear'")

    @staticmethod
    def parse(text: str) -> Schedule:
        """``value``, ``value -> value @ step``, and so on; ``~>`` is linear, ``*>`` geometric, ``^>`` cubic.

        Raises DistcompError for anything else.
        """
        arrows = set(_ARROW.findall(text))
        first, *others = _ARROW.split(text)
        try:
            points = [(0, _number(first))]
            for other in others:
                value, at, step = other.partition("@")
                if not at:
                    raise ValueError
                points.append((int(step), _number(value)))
        except ValueError:
            points = []
        if not points or len(arrows) > 1:
            raise DistcompError(
                f"{text[:80]!r} is no schedule; write '8 -> 4 @ 1000 -> 2 @ 5000', or ~> (linear), "
                "*> (geometric) or ^> (cubic) throughout"
            )
        return Schedule(tuple(points), ARROWS[arrows.pop()] if arrows else "step")

    def __str__(self) -> str:
        arrow = next(sign for sign, shape in ARROWS.items() if shape == self.shape)
        (_, first), *others = self.points
        return f"{first!r}" + "".join(f" {arrow} {value!r} @ {step}" for step, value in others)

    def __call__(self, step: int) -> float:
        """The value in a step."""
        if step <= self.points[0][0]:
            return float(self.points[0][1])
        for (begin, low), (end, high) in pairwise(self.points):
            if step < end:
                part = (step - begin) / (end - begin)
                if self.shape == "linear":
                    return low + (high - low) * part
                if self.shape == "cubic":
                    return high + (low - high) * (1 - part) ** 3
                return low * (high / low) ** part if self.shape == "geometric" else float(low)
        return float(self.points[-1][1])

    @property
    def values(self) -> tuple[float, ...]:
        """The values at its points: the largest and the smallest that it ever has are among them."""
        return tuple(value for _, value in self.points)


def _number(text: str) -> float:
    number = float(text)
    return int(number) if number.is_integer() else number


Varying = float | Schedule
"""A number, or a schedule of one."""


def varying(value: float | str | Schedule) -> Varying:
    """A setting as its user gave it: a number, a schedule, or the text of one."""
    return Schedule.parse(value) if isinstance(value, str) else value


def at(value: Varying, step: int) -> float:
    """The number in a step."""
    return value(step) if isinstance(value, Schedule) else value


def whole(value: Varying, step: int) -> int:
    """The whole number nearest to it (halves go up)."""
    return math.floor(at(value, step) + 0.5)


def extremes(value: Varying) -> tuple[float, float]:
    """The smallest and the largest value that it ever has."""
    values = value.values if isinstance(value, Schedule) else (value,)
    return min(values), max(values)
