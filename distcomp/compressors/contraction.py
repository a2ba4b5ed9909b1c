"""Does a compressor contract, and by how much must one that does not be damped? One rule for all who need it.

An unbiased compressor with ``E|C(x)-x|^2 <= omega |x|^2`` becomes a contraction when it is damped::

    |C(x)/(1+omega) - x|^2 <= (1 - delta) |x|^2,    delta = 1/(1+omega)

Error feedback, EF21, CHOCO and DeepSqueeze feed what was not sent back into what is sent next; without a
contraction it grows without end.

A *declared* ``omega`` or ``delta`` is the worst case over all data: EF21's proof needs it. *Measured* is the
usual case, on Gaussian numbers that a fixed key draws, the same on every rank: by it step sizes, patterns and
second stages are chosen.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import torch

from distcomp.compressors.base import Compressor
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.randomness import Key

SAMPLE = 1 << 20
"""A sample of parameters with so many elements in all is enough to measure a compressor's error."""


@lru_cache
def relative_error(compressor: Compressor, layout: Layout) -> float:
    """``alpha = |C(z) - z| / |z|`` on Gaussian data in the model's shapes: the same on every rank."""
    # Whole parameters, never a part of one: blocks and counts must be those of the model.
    ends = itertools.accumulate(param.numel for param in layout.slices)
    some = Layout(
        tuple(param for param, end in zip(layout.slices, ends, strict=True) if end - param.numel < SAMPLE)
    )
    key = Key.of("relative error")  # without the run's seed: what is chosen by it must not depend on that
    z = torch.randn(some.numel, generator=key.generator(), dtype=torch.float32)
    error = compressor.decode(compressor.encode(z, some, key), some) - z
    return float(error.norm() / z.norm()) if some.numel else 0.0


@dataclass(frozen=True)
class Contraction:
    """``|a C(x) - x|^2 <= (1 - delta) |x|^2`` for ``a = damping``; ``omega`` is the variance of what is
    unbiased."""

    delta: float
    damping: float = 1.0
    omega: float | None = None

    @staticmethod
    def of_unbiased(omega: float) -> Contraction:
        """Divided by ``1 + omega``."""
        return Contraction(1 / (1 + omega), 1 / (1 + omega), omega)


def measured_contraction(compressor: Compressor, layout: Layout) -> Contraction:
    """On Gaussian data in the model's shapes. What is unbiased is damped, whatever its variance: then it errs
    least."""
    error = relative_error(compressor, layout) ** 2
    return Contraction.of_unbiased(error) if compressor.unbiased else Contraction(1 - error)


def declared_contraction(compressor: Compressor, numel: int) -> Contraction | None:
    """For all data of ``numel`` values; None where neither a contraction nor a variance is declared."""
    delta, omega = compressor.delta(numel), compressor.omega(numel)
    # What contracts by itself is not damped, though damping would lower its error: the papers do not either.
    if delta is not None:
        return Contraction(delta, omega=omega)
    return None if omega is None else Contraction.of_unbiased(omega)


def needed_contraction(compressor: Compressor, numel: int, who: str) -> Contraction:
    """The declared contraction. Raises DistcompError where there is none."""
    contraction = declared_contraction(compressor, numel)
    if contraction is None:
        raise DistcompError(
            f"{who} needs a contraction or an unbiased compressor, which {compressor} is not; use TopK or "
            "Quantize"
        )
    return contraction
