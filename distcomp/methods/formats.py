"""The floats of 4 and 8 bits that hardware multiplies, as gradients' payloads: fp8, MXFP8, MXFP4, NVFP4."""

from __future__ import annotations

from distcomp.compressors import MXFP4, MXFP8, NVFP4, Float8
from distcomp.methods.base import Method
from distcomp.methods.basic import except_small, with_feedback
from distcomp.methods.registry import register

TWICE = (
    "biases and norms in float32; from three ranks on the mean is rounded a second time, to a uniform grid "
    "with as many bits as keep the variance below twice"
)
"""What happens to all of them alike."""


@register(
    paper="Micikevicius et al., FP8 formats for deep learning, 2022",
    wire="(n-1)/n (2 d + 8 d/block); at two ranks one payload",
    summable=False,
    biased=False,
    deviations=f"rounded at random, to the nearest with error feedback if asked; {TWICE}",
    limitations="where 8 bits are too many; qsgd:bits=8 rounds values near a block's largest more finely",
)
def fp8(
    format: str = "e4m3", block: int = 128, rounding: str = "stochastic", hadamard: bool = False
) -> Method:
    """Send floats of 8 bits in units of their block's largest value, rounded at random: the mean is right.

    ``format``: ``e4m3`` or ``e5m2``. See :class:`distcomp.compressors.Float8` for the equation.
    """
    return except_small(with_feedback(Float8(rounding, hadamard, format, block)))


@register(
    paper="Open Compute Project, Microscaling formats (MX) specification v1.0, 2023",
    wire="(n-1)/n (2 d + d/32 + 4 d/32); at two ranks one payload",
    summable=False,
    biased=False,
    deviations=f"rounded at random with a scale that clamps nothing, to the nearest if asked; {TWICE}",
    limitations="where 8 bits are too many; its scales are powers of two, so that up to half of a block's "
    "range lies idle",
)
def mxfp8(format: str = "e4m3", rounding: str = "stochastic", hadamard: bool = False) -> Method:
    """Send floats of 8 bits, times a power of two for each block of 32: MXFP8, rounded at random.

    ``format``: ``e4m3`` or ``e5m2``. See :class:`distcomp.compressors.MXFP8` for the equation.
    """
    return except_small(with_feedback(MXFP8(rounding, hadamard, format)))


@register(
    paper="Open Compute Project, Microscaling formats (MX) specification v1.0, 2023; Tseng et al., Training "
    "LLMs with MXFP4, AISTATS 2025",
    wire="(n-1)/n (d (4 + bits2)/8 + d/32 + 4 d/32), bits2 those of the mean; at two ranks one payload",
    summable=False,
    biased=False,
    deviations=f"rounded at random with a scale that clamps nothing, to the nearest if asked; {TWICE}",
    limitations="one outlier in a block of 32 leaves the others two or three levels; rotate then",
)
def mxfp4(rounding: str = "stochastic", hadamard: bool = False) -> Method:
    """Send floats of 4 bits, times a power of two for each block of 32: MXFP4, rounded at random.

    See :class:`distcomp.compressors.MXFP4` for the equation.
    """
    return except_small(with_feedback(MXFP4(rounding, hadamard)))


@register(
    paper="NVIDIA, Pretraining large language models with NVFP4, 2025",
    wire="(n-1)/n (d (4 + bits2)/8 + d/16 + 8 d/group), bits2 those of the mean; at two ranks one payload",
    summable=False,
    biased=False,
    deviations="groups of values in the place of whole tensors; rounded at random with scales that clamp "
    f"nothing, to the nearest if asked; {TWICE}",
    limitations="more bytes than mxfp4 for a finer scale; one outlier in 16 leaves the others few levels",
)
def nvfp4(rounding: str = "stochastic", hadamard: bool = False, group: int = 1024) -> Method:
    """Send floats of 4 bits, times an FP8 scale for each 16 and a float32 for each ``group``: NVFP4.

    See :class:`distcomp.compressors.NVFP4` for the equation.
    """
    return except_small(with_feedback(NVFP4(rounding, hadamard, group)))
