"""The recipe of the warm-up: no compression at first."""

from __future__ import annotations

from distcomp.methods.base import Method
from distcomp.methods.powersgd import powersgd
from distcomp.methods.registry import method_of, register
from distcomp.methods.scheduled import Warmup

INNER = powersgd()
"""Afterwards, unless another is given."""


@register(
    paper="none: the first steps uncompressed, as DGC, PowerSGD, GradiVeQ and 1-bit Adam all recommend",
    wire="2 (n-1)/n 4d in the first steps, then that of the inner method (powersgd, if no other is given)",
    summable=True,
    biased=True,
    limitations="in runs that are not much longer than its steps, and where gradients are still unsettled "
    "after them",
)
def warmup(inner: Method | str = INNER, steps: int = 100) -> Method:
    """Send float32 in the first steps and compress afterwards.

    ``inner`` is a method or the text of one (``"qsgd:bits=4"``), ``steps`` how long to wait for it. See
    :class:`distcomp.methods.Warmup`.
    """
    return Warmup(method_of(inner), steps)
