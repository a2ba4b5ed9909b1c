"""Quantizers whose payloads are gathered, or reduced by the owner of each chunk."""

from __future__ import annotations

from distcomp.compressors import Compressor, Natural, NonUniform, OneBit, Quantize, ScaledSign
from distcomp.methods.base import Method
from distcomp.methods.basic import except_small, with_feedback
from distcomp.methods.registry import register


@register(
    paper="Horváth et al., Natural compression for distributed deep learning, 2019",
    wire="(n-1)/n (9d/8 + d + 4 d/block); up to 8 bits (n-1)/n (d (bits + bits2)/8 + 8 d/block); at two "
    "ranks one payload",
    summable=False,
    biased=False,
    deviations="up to 8 bits count exponents from the block's largest magnitude down, and round to 0 below; "
    "from three ranks on the mean is rounded a second time, to a uniform grid of at most 8 bits",
    limitations="where 9 bits are still too many; fewer bits are coarse in the upper half of each block's "
    "range",
)
def natural(bits: int = 9, block: int = 512) -> Method:
    """Round each value at random to a power of two beside it: sign and exponent, 9 bits, the mean is right.

    See :class:`distcomp.compressors.Natural`; with fewer ``bits`` (2 to 8) natural dithering with the max
    norm of each ``block``, :class:`distcomp.compressors.NonUniform`.
    """
    compressor: Compressor = Natural() if bits == 9 else NonUniform(bits, block, "max")
    return except_small(with_feedback(compressor))


@register(
    paper="Ramezani-Kebrya et al., NUQSGD, JMLR 2021",
    wire="(n-1)/n (d (bits + bits2)/8 + 8 d/block), bits2 >= bits those of the mean; at two ranks one "
    "payload",
    summable=False,
    biased=False,
    deviations="fixed-width codes in the place of Huffman's; bits count the sign; blocks; from three ranks "
    "on the mean is rounded a second time, to a uniform grid with as many bits as keep the variance below "
    "twice",
    limitations="few levels near the norm: blocks whose values are of one size are rounded coarsely",
)
def nuqsgd(bits: int = 4, block: int = 512, norm: str = "l2") -> Method:
    """Round each value at random to a level beside it, 0, 2^(1-s), ..., 1/2, 1 of its block's norm.

    See :class:`distcomp.compressors.NonUniform` for the equation.
    """
    return except_small(with_feedback(NonUniform(bits, block, norm)))


@register(
    paper="Karimireddy et al., Error feedback fixes SignSGD, ICML 2019",
    wire="2 (n-1)/n (d/8 + 4 per parameter), or (n-1) payloads where that is less",
    summable=False,
    biased=True,
    deviations="residuals in gradient units (no learning rate inside); sign(0) = +1; from three ranks on the "
    "mean is encoded a second time, and the owner of a chunk owes for it; biases and norms in float32",
    limitations="without its residual; and where magnitudes differ much within a parameter, for which "
    "block > 0 helps",
)
def ef_signsgd(block: int = 0, error_feedback: bool = True) -> Method:
    """Send signs and each parameter's mean magnitude, and owe the rest.

    ``block > 0`` takes one magnitude per so many values instead of one per parameter, and lets a parameter be
    cut: without it, a bucket of one large parameter has one owner, whose link carries what all ranks send.
    Without ``error_feedback`` the rest is forgotten: a control. See
    :class:`distcomp.compressors.ScaledSign`.
    """
    compressor: Compressor = Quantize(1, block) if block else ScaledSign()
    return except_small(with_feedback(compressor, error_feedback=error_feedback))


@register(
    paper="Seide et al., 1-bit stochastic gradient descent, Interspeech 2014",
    wire="2 (n-1)/n (d/8 + 8 per output unit), or (n-1) payloads where that is less",
    summable=False,
    biased=True,
    deviations="the second quantization's error is owed by the owner of the chunk; biases and norms in "
    "float32; for the paper's cold start see warmup",
    limitations="without error feedback training diverges; large first gradients call for a warmup",
)
def onebit(error_feedback: bool = True) -> Method:
    """Send one bit per value, decoded to the mean of its unit's values of that sign, and owe the rest.

    See :class:`distcomp.compressors.OneBit` for the equation. Without ``error_feedback`` training soon
    diverges.
    """
    return except_small(with_feedback(OneBit(), error_feedback=error_feedback))
