"""The methods that need nothing but a compressor: none at all, half-width floats, QSGD, and the control."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import Tensor

from distcomp.collectives import Rounds
from distcomp.compressors import Cast, Compressor, Identity, Quantize
from distcomp.compressors.contraction import declared_contraction
from distcomp.layout import Layout
from distcomp.methods.base import AggregateResult, Method, State, StepContext
from distcomp.methods.feedback import ErrorFeedback
from distcomp.methods.from_compressor import from_compressor
from distcomp.methods.partition import Partition, Rule
from distcomp.methods.registry import register

PLAIN = Rule(roles=("bias", "norm"))
"""What goes uncompressed unless asked otherwise: biases and norms, few and sensitive."""


WHOLE_MODEL = 2**40
"""Elements: more than any block holds, so that what is declared for it holds for every parameter."""


def except_small(method: Method) -> Method:
    """``method`` for everything but biases and norms, which ride a float32 all-reduce."""
    return Partition(PLAIN, from_compressor(Identity()), method)


def with_feedback(
    compressor: Compressor, pattern: str = "auto", error_feedback: bool | None = None
) -> Method:
    """The method made from a compressor, with error feedback where it is biased (or where it is asked for).

    Warns where error feedback meets a compressor that declares no contraction: its residuals may grow without
    end.
    """
    method = from_compressor(compressor, pattern)
    # What is unbiased errs to either side and is averaged out; what is biased must be owed.
    wanted = not compressor.unbiased if error_feedback is None else error_feedback
    if not wanted:
        return method
    contraction = declared_contraction(compressor, WHOLE_MODEL)
    if contraction is None or contraction.damping < 1:
        omega = None if contraction is None else contraction.omega
        known = "" if omega is None else f" (its variance is bounded by {omega:.3g} times its input's square)"
        warnings.warn(
            f"error feedback needs a contraction, and {compressor} guarantees none{known}: residuals may "
            "grow without end; use more bits or smaller blocks, or error_feedback=False where it is unbiased",
            stacklevel=3,
        )
    return ErrorFeedback(method)


@register(
    paper="none: the exact mean, as DistributedDataParallel computes it",
    wire="2 (n-1)/n 4d",
    summable=True,
    biased=False,
    limitations="it saves nothing: the baseline of all others",
)
def identity() -> Method:
    """Send float32: bit-equal to DistributedDataParallel at two ranks."""
    return from_compressor(Identity())


@register(
    paper="none: rounding to the nearest bfloat16",
    wire="2 (n-1)/n 2d",
    summable=True,
    biased=True,
    deviations="PyTorch's bf16_compress_hook refuses the CPU; this one runs on any backend",
    limitations="on a fast network, where half the bytes save less time than the casts take",
)
def bf16() -> Method:
    """Send bfloat16: half the bytes, the range of float32, 8 significant bits."""
    return from_compressor(Cast("bf16"))


@register(
    paper="none: rounding to the nearest float16",
    wire="2 (n-1)/n 2d",
    summable=True,
    biased=True,
    deviations="divides by n before it rounds, clamps finite values to 65504 and lets an infinity through",
    limitations="values below 6e-8 become 0 and those above 65504 are clamped; without a loss scaler "
    "prefer bf16",
)
def fp16() -> Method:
    """Send float16: half the bytes, 11 significant bits, values above 65504 are clamped."""
    return from_compressor(Cast("fp16"))


@register(
    paper="Alistarh et al., QSGD, NeurIPS 2017; one bit: Karimireddy et al., ICML 2019",
    wire="(n-1)/n (d (bits + bits2)/8 + 8 d/block), bits2 >= bits those of the mean; at two ranks one "
    "payload",
    summable=False,
    biased=False,
    deviations="bits count the sign; fixed-width codes; one bit is sign times the block's mean magnitude, "
    "with error feedback; biases and norms are sent in float32; from three ranks on their mean is rounded "
    "a second time, with as many bits as keep the variance below twice that of one rounding",
    limitations="at one or two bits without error feedback the noise of rounding exceeds the gradient; "
    "one outlier makes its whole block coarse",
)
def qsgd(
    bits: int = 4,
    block: int = 512,
    norm: str = "max",
    rounding: str = "stochastic",
    pattern: str = "auto",
    error_feedback: bool | None = None,
) -> Method:
    """Round each value to one of a few levels of its block, at random so that the mean is right.

    See :class:`distcomp.compressors.Quantize` for the equation. ``error_feedback=None`` adds it where the
    quantizer is biased: at one bit, and with rounding to nearest. ``pattern`` forces ``all_gather`` or
    ``reduce_scatter``.
    """
    return with_feedback(Quantize(bits, block, norm, rounding, PLAIN.roles), pattern, error_feedback)


@dataclass(frozen=True)
class NoCommunication(Method):
    """Send nothing: each rank's own tensor is its estimate, ``estimate_i = x_i``, and its contribution.

    Replicas drift apart, so the estimates are not equal: a control, not a method. On the wire: nothing.
    """

    propagates_nonfinite = True

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        yield from ()
        return AggregateResult(x, lambda: x, state)

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        return 0


@register(
    paper="none: the control that shows what communication is worth",
    wire="0",
    summable=True,
    biased=True,
    deviations="does not communicate",
    control=True,
    limitations="always: every rank learns from its own data alone",
)
def none() -> Method:
    """Do not communicate at all: every rank trains alone on its shard."""
    return NoCommunication()
