"""How figures are written: three digits that mean something, with their unit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from distcomp.report.figures import Comparison, MethodRow, Spread

MISSING = "–"
_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Scale:
    """How a value is written: so many decimals of a unit."""

    decimals: int
    unit: str = ""
    per_unit: float = 1.0

    def write(self, value: float) -> str:
        """The value without its unit."""
        return f"{value / self.per_unit:.{self.decimals}f}" if math.isfinite(value) else "diverged"


def number(value: float) -> Scale:
    """Three significant digits, never in powers of ten: 0.0123, 1.23, 12.3, 1230."""
    return Scale(_decimals(value))


def size(nbytes: float) -> Scale:
    """Decimal units: 980 B, 12.3 kB, 6.31 MB."""
    power = 0
    while power < len(_BYTE_UNITS) - 1 and abs(nbytes) >= 999.5 * 1000**power:
        power += 1
    return Scale(_decimals(nbytes / 1000**power) if power else 0, f" {_BYTE_UNITS[power]}", 1000.0**power)


def seconds(value: float) -> Scale:
    """Milliseconds below a tenth of a second: 3.20 ms, 0.534 s, 41.2 s."""
    if 0 < value < 0.1:
        return Scale(_decimals(value * 1000), " ms", 1e-3)
    return Scale(_decimals(value), " s")


def percent(share: float) -> Scale:
    """A share of one: 89.1 %."""
    return Scale(1, " %", 0.01)


def loss(value: float) -> Scale:
    """Four decimals while it is small."""
    return Scale(4) if abs(value) < 10 else number(value)


Write = Callable[[float], Scale]


def formatted(value: float, write: Write) -> str:
    """A value with its unit."""
    scale = write(value)
    return scale.write(value) + (scale.unit if math.isfinite(value) else "")


def with_spread(figures: Spread | None, write: Write) -> str:
    """The mean, and the spread to the same decimal where there is one: 0.3483 ±0.0009."""
    if figures is None:
        return MISSING
    scale = write(figures.mean)
    deviation = scale.write(figures.deviation)
    if not float(deviation):
        return formatted(figures.mean, write)
    return f"{scale.write(figures.mean)} ±{deviation}{scale.unit}"


def to_target(row: MethodRow, comparison: Comparison) -> str:
    """Seconds until the target loss, or how many of the runs got there."""
    if comparison.target_loss is None or all(run.test_loss is None for run in row.runs):
        return MISSING
    if row.to_target_s is not None:
        return with_spread(row.to_target_s, number)
    return f"{row.reached} of {len(row.runs)}" if row.reached else "never"


def speed_up(row: MethodRow) -> str:
    """How many times sooner than the baseline."""
    return MISSING if row.speed_up is None else f"{formatted(row.speed_up, number)}×"


def _decimals(value: float) -> int:
    """How many decimals three significant digits take."""
    if value == 0 or not math.isfinite(value):
        return 0
    rounded = float(f"{value:.2e}")
    return max(0, 2 - math.floor(math.log10(abs(rounded))))
