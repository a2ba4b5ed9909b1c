"""Deep gradient compression: clipping, momentum and masking on the near side of a sparse exchange."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.collectives import Rounds
from distcomp.compressors import TopK
from distcomp.compressors.topk import with_values
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods.base import AggregateResult, Method, State, StepContext
from distcomp.methods.basic import PLAIN, with_feedback
from distcomp.methods.correction import MomentumCorrection
from distcomp.methods.partition import Partition
from distcomp.methods.registry import register
from distcomp.methods.scheduled import EXACT


@dataclass(frozen=True)
class Clipped(Method):
    """Each rank's gradient of a parameter, scaled down to the norm ``limit / sqrt(n)`` where it is longer.

    ::

        x_i <- x_i min(1, limit / (sqrt(n) |x_i|))        per parameter; then inner(x_i)

    If the ranks' gradients are independent, their sum then keeps to ``limit``. On the wire: ``inner``'s
    bytes.

    Source: Lin et al., ICLR 2018, section 3.2, local gradient clipping. We differ: a parameter is clipped by
    itself, for a bucket knows nothing of the others; the paper clips the whole gradient.

    Raises DistcompError for a limit that is not above zero.
    """

    inner: Method
    limit: float

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise DistcompError(f"a gradient is clipped to a norm above zero, not {self.limit}")

    def init(self, layout: Layout) -> State:
        return self.inner.init(layout)

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        limit = self.limit * context.size**-0.5
        clipped = torch.empty_like(x)
        for (_, piece), (_, out) in zip(
            context.layout.pieces(x), context.layout.pieces(clipped), strict=True
        ):
            norm = torch.linalg.vector_norm(piece, dtype=torch.float64)  # squares of large values fit
            # A norm of zero gives an infinity, of which the clamp makes 1.
            torch.mul(piece, (limit / norm).clamp(max=1.0).float(), out=out)
        return (yield from self.inner.aggregate(clipped, state, context))

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        return self.inner.payload_bytes(layout, size, step)


@register(
    paper="Lin et al., Deep gradient compression, ICLR 2018",
    wire="(n-1) k (4 + (2 + log2(d/k))/8), k = ratio d",
    summable=False,
    biased=True,
    direction=True,
    deviations="exactly k elements per parameter (the paper's sampled threshold varies); packed indices; "
    "clipping per parameter; what rounding of the values left over is owed; biases and norms in float32",
    limitations="with momentum in the optimizer, which then counts twice; at 0.1 % from the first step "
    "on, without a warmup",
)
def dgc(
    ratio: float = 0.001,
    momentum: float = 0.9,
    nesterov: bool = False,
    clip: float = 0.0,
    values: str = "fp32",
) -> Method:
    """Send the k largest elements of accumulated momentum, and clear what was sent.

    ::

        u <- m u + g;   v <- v + u        momentum correction, local accumulation
        send v where it is among the k largest magnitudes of its parameter
        v <- 0, u <- 0  where it was sent                   momentum factor masking
        estimate = 1/n sum_i sent_i

    which is :class:`distcomp.methods.MomentumCorrection` (``momentum``; ``nesterov``: ``u <- m (u + g)``,
    ``v <- v + u + g``) with masking, around error feedback, around :class:`distcomp.compressors.TopK` at
    density ``ratio``. The optimizer must be SGD with momentum 0. ``clip > 0`` first applies
    :class:`distcomp.methods.Clipped`. ``values`` are ``fp32``, ``bf16``, ``fp16``, ``int8``, ``int4``,
    ``int2`` or ``sign``. The paper's warm-up of the density is a schedule of ``ratio``; where an epoch has
    500 steps: ``"0.25 -> 0.0625 @ 500 -> 0.015625 @ 1000 -> 0.004 @ 1500 -> 0.001 @ 2000"``. Two tensors of
    the model's size per rank.
    """
    residual = with_feedback(with_values(TopK(ratio), values), "all_gather", error_feedback=True)
    sparse: Method = MomentumCorrection(residual, momentum, nesterov, masking=True)
    if clip:
        sparse = Clipped(sparse, clip)
    return Partition(PLAIN, MomentumCorrection(EXACT, momentum, nesterov), sparse)
