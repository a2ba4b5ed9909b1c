"""Quantizers whose payloads are gathered, or reduced by the owner of each chunk."""

from __future__ import annotations

from distcomp.compressors import Compressor, Natural, NonUniform, OneBit, Quantize, ScaledSign
from distcomp.methods.base import Method
from distcomp.methods.basic import except_small, with_feedback
from distcomp.methods.registry import register


@register(
    paper="Horváth et al., Natural compression for distributed deep learning, 2019",
    wire="2 (n-1)/n 9d/8, or (n-1) payloads where that is less; bits <= 8: d bits/8 + 4 d/block in the place of 9d/8",
    summable=False,
    biased=False,
    differs="8 bits or fewer count exponents from the block's largest magnitude down, and round to 0 below them",
)
def natural(bits: int = 9, block: int = 512) -> Method:
    """Round each value to a power of two beside it, at random so that the mean is right: sign and exponent, 9 bits.

    See :class:`distcomp.compressors.Natural`; with fewer ``bits`` (2 to 8) natural dithering with the max
    norm of each ``block``, :class:`distcomp.compressors.NonUniform`.
    """
    compressor: Compressor = Natural() if bits == 9 else NonUniform(bits, block, "max")
    return except_small(with_feedback(compressor))


@register(
    paper="Ramezani-Kebrya et al., NUQSGD, JMLR 2021",
    wire="2 (n-1)/n (d bits/8 + 4 d/block), or (n-1) payloads where that is less",
    summable=False,
    biased=False,
    differs="fixed-width codes in the place of Huffman's; bits count the sign; blocks",
)
def nuqsgd(bits: int = 4, block: int = 512, norm: str = "l2") -> Method:
    """Round each value to one of the levels 0, 2^(1-s), ..., 1/2, 1 of its block's norm, at random so that the mean is right.

    See :class:`distcomp.compressors.NonUniform` for the equation.
    """
    return except_small(with_feedback(NonUniform(bits, block, norm)))


@register(
    paper="Karimireddy et al., Error feedback fixes SignSGD, ICML 2019",
    wire="2 (n-1)/n (d/8 + 4 per parameter), or (n-1) payloads where that is less",
    summable=False,
    biased=True,
    differs="residuals in gradient units (the learning rate is not inside); sign(0) = +1; biases and norms in float32",
)
def ef_signsgd(block: int = 0, error_feedback: bool = True) -> Method:
    """Send signs and each parameter's mean magnitude, and owe the rest: sign(x) |x|_1 / d with error feedback.

    ``block > 0`` takes one magnitude per so many values instead of one per parameter. See
    :class:`distcomp.compressors.ScaledSign`.
    """
    compressor: Compressor = Quantize(1, block) if block else ScaledSign()
    return except_small(with_feedback(compressor, error_feedback=error_feedback))


@register(
    paper="Seide et al., 1-bit stochastic gradient descent, Interspeech 2014",
    wire="2 (n-1)/n (d/8 + 8 per output unit), or (n-1) payloads where that is less",
    summable=False,
    biased=True,
    differs="the second quantization's error is owed by the owner of the chunk; biases and norms in float32; the paper's "
    "cold start without quantization is a warm-up wrapper",
)
def onebit(error_feedback: bool = True) -> Method:
    """Send one bit per value, decoded to the mean of its unit's non-negative or of its negative values, and owe the rest.

    See :class:`distcomp.compressors.OneBit` for the equation.
    """
    return except_small(with_feedback(OneBit(), error_feedback=error_feedback))
