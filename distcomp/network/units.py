"""Rates and delays as people write them: ``"100mbit"``, ``"2.5gbit"``, ``"20ms"``, ``"unshaped"``."""

from __future__ import annotations

import math
import re
from decimal import Decimal

from distcomp.errors import DistcompError

UNSHAPED = math.inf
"""The rate of a link that nothing holds back: a byte takes ``8 / inf = 0`` seconds."""

_RATE_UNITS = {"bit": 0, "kbit": 3, "mbit": 6, "gbit": 9}  # powers of ten
_ALIASES = {"bps": "bit", "kbps": "kbit", "mbps": "mbit", "gbps": "gbit"}
_TIME_UNITS = {"us": -6, "ms": -3, "s": 0}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z/]+)\s*")


def parse_rate(text: str | float) -> float:
    """Bits per second of ``"100mbit"`` (or ``"100 Mbit/s"``, ``"100Mbps"``, or a number); ``inf`` for
    ``"unshaped"``. Everything is in bits, ``"mbps"`` too, which `tc` alone reads as bytes.

    Raises DistcompError for anything else, and for bytes, ``"100MB/s"``.
    """
    if isinstance(text, str) and text.strip().lower() == "unshaped":
        return UNSHAPED
    remedy = 'write it like "100mbit" (bit, kbit, mbit or gbit per second) or "unshaped"'
    if isinstance(text, str) and re.search(r"[0-9\s][kKMG]?B(/s|ps)?\s*$", text):
        raise DistcompError(f"the rate {text!r} is in bytes; give bits per second, 8 times as many: {remedy}")
    value = _parse(text, _RATE_UNITS, "rate", remedy, suffix="/s")
    if not value > 0:
        raise DistcompError(f"the rate {text!r} is not above zero; {remedy}")
    return value


def parse_time(text: str | float) -> float:
    """Seconds of ``"20ms"`` (us, ms or s); numbers are seconds. Raises DistcompError for anything else."""
    remedy = 'write it like "20ms" (us, ms or s)'
    value = _parse(text, _TIME_UNITS, "delay", remedy, suffix="")
    if not 0 <= value < math.inf:
        raise DistcompError(f"the delay {text!r} is not a finite time of zero or more; {remedy}")
    return value


def format_rate(rate_bps: float) -> str:
    """The shortest way to write a rate that :func:`parse_rate` reads back exactly."""
    return "unshaped" if rate_bps == UNSHAPED else _format(rate_bps, _RATE_UNITS)


def format_time(time_s: float) -> str:
    """The shortest way to write a time that :func:`parse_time` reads back exactly."""
    return _format(time_s, _TIME_UNITS)


def _parse(text: str | float, units: dict[str, int], what: str, remedy: str, suffix: str) -> float:
    if isinstance(text, bool) or not isinstance(text, (str, int, float)):
        raise DistcompError(f"the {what} {text!r} is a {type(text).__name__}; {remedy}")
    if not isinstance(text, str):
        return float(text)
    match = _QUANTITY.fullmatch(text)
    unit = match[2].lower().removesuffix(suffix) if match else ""
    unit = _ALIASES.get(unit, unit) if units is _RATE_UNITS else unit
    if match is None or unit not in units:
        raise DistcompError(f"the {what} {text!r} cannot be read; {remedy}")
    return float(Decimal(match[1]).scaleb(units[unit]))


def _format(value: float, units: dict[str, int]) -> str:
    exact = Decimal(repr(value)).normalize()
    return min((f"{exact.scaleb(-power):f}{unit}" for unit, power in units.items()), key=len)
