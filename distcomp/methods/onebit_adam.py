"""1-bit Adam: Adam at first; then its variance stands still and its momentum is what is compressed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distcomp.collectives import Rounds
from distcomp.compressors import Quantize
from distcomp.errors import DistcompError
from distcomp.layout import FlatBuffer, Layout
from distcomp.methods.base import AggregateResult, Method, PerParameter, State, StepContext
from distcomp.methods.basic import PLAIN
from distcomp.methods.feedback import ErrorFeedback
from distcomp.methods.from_compressor import from_compressor
from distcomp.methods.registry import register
from distcomp.methods.scheduled import EXACT

if TYPE_CHECKING:
    from torch.optim.optimizer import Optimizer


@dataclass(frozen=True)
class OneBitAdam(Method):
    """Adam's step in the place of the mean gradient; after ``freeze_step`` steps the momentum goes through
    ``inner``.

    ::

        m_i = b1 m + (1 - b1) x_i                           # m is the same on every rank, m_i is not
        step < freeze_step:   m = mean_i(m_i);  v <- b2 v + (1 - b2) mean(x)^2      # float32
        afterwards:           m = inner(m_i);   v stays
        estimate = D(m) = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^s)) + eps),    contribution_i = D(inner's)

    t counts the steps, s those in which v moved. So the optimizer that is attached must be plain
    ``SGD(lr)``: its step *is* Adam's (with its ``weight_decay`` that of AdamW). D is linear in m, so the
    law of contributions holds. ``inner`` is error feedback over one bit: its residual holds the worker's
    error and, on the owner of a chunk, the server's, and is checkpointed. Where v is still zero when it
    freezes (rows of an embedding that never occurred) the step is zero: one bit cannot say "nothing", and
    would be divided by eps.

    On the wire: ``2 (n-1)/n 4d`` bytes at first, then ``inner``'s. Memory: m and v, and inner's.

    Source: Tang et al., "1-bit Adam", ICML 2021; DeepSpeed. We differ: bias correction as in Adam
    throughout (DeepSpeed's applies none), one bit is sign times the mean magnitude of blocks of 512, biases
    and norms stay in float32, steps that a GradScaler skips do not count in t and s, the errors survive a
    checkpoint.

    Raises DistcompError for betas outside [0, 1), an eps of 0 or less, no warm-up, or another optimizer.
    """

    inner: Method
    freeze_step: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise DistcompError(f"betas lie in [0, 1), not {self.betas}; Adam's are (0.9, 0.999)")
        if self.eps <= 0 or self.freeze_step < 1:
            raise DistcompError(
                f"eps={self.eps} must be above 0 and freeze_step={self.freeze_step} 1 or more: v is learnt "
                "before it freezes (15 to 25 % of all steps)"
            )

    def check(self, optimizer: Optimizer | None) -> None:
        if not isinstance(optimizer, torch.optim.SGD) or any(
            group["momentum"] or group["nesterov"] for group in optimizer.param_groups
        ):
            raise DistcompError(
                "onebit_adam computes Adam's step itself; attach it with torch.optim.SGD(lr, momentum=0), "
                f"not {type(optimizer).__name__}"
            )

    def init(self, layout: Layout) -> State:
        return {
            "momentum": FlatBuffer(torch.zeros(layout.numel, dtype=torch.float32), layout),
            "variance": FlatBuffer(torch.zeros(layout.numel, dtype=torch.float32), layout),
            "steps": PerParameter({name: torch.zeros(2, dtype=torch.float32) for name in layout.names}),
            "inner": self.inner.init(layout),
        }

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        warm = context.step < self.freeze_step
        beta1, beta2 = self.betas
        before, v = state["momentum"].data, state["variance"].data

        # b1 m + (1 - b1) x_i: the common m, and this rank's own gradient. So the mean of m_i is Adam's m.
        own = torch.lerp(x, before, beta1)
        if warm:
            # The gradient is averaged, not the momentum: v needs the mean's square, and m follows from it.
            result = yield from EXACT.aggregate(x, {}, context)
            g = result.estimate
            m = torch.lerp(g, before, beta1)
            v = beta2 * v + (1 - beta2) * g.square()
            share: Callable[[], Tensor] = lambda: own  # noqa: E731
        else:
            result = yield from self.inner.aggregate(own, state["inner"], context)
            m = result.estimate
            share = result.contribution

        # Counted here, not taken from the step: one that a GradScaler skips commits no state.
        moved = x.new_tensor([1.0, float(warm)])
        steps = PerParameter({name: state["steps"][name] + moved for name in context.layout.names})
        new = {
            "momentum": FlatBuffer(m, context.layout),
            "variance": FlatBuffer(v, context.layout),
            "steps": steps,
            "inner": state["inner"] if warm else result.state,
        }
        return AggregateResult(
            self._direction(m, v, steps, context.layout),
            lambda: self._direction(share(), v, steps, context.layout),
            new,
        )

    def _direction(self, m: Tensor, v: Tensor, steps: PerParameter, layout: Layout) -> Tensor:
        """Adam's step for a momentum: D."""
        out = torch.empty_like(m)
        for (param, piece), (_, momentum), (_, variance) in zip(
            layout.pieces(out), layout.pieces(m), layout.pieces(v), strict=True
        ):
            t, s = steps[param.name]
            scale = (variance / (1 - self.betas[1] ** s)).sqrt_().add_(self.eps)
            torch.div(momentum / (1 - self.betas[0] ** t), scale, out=piece)
            piece.masked_fill_(variance == 0, 0.0)
        return out

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        method = EXACT if step < self.freeze_step else self.inner
        return method.payload_bytes(layout, size, step)


@register(
    paper="Tang et al., 1-bit Adam, ICML 2021",
    wire="2 (n-1)/n 4d in the first freeze_step steps, then 2 (n-1)/n (d/8 + 4 d/block)",
    summable=True,
    biased=True,
    direction=True,
    deviations="bias correction throughout (DeepSpeed's applies none); one bit is sign times the block's "
    "mean magnitude; biases and norms in float32; the errors are checkpointed",
    limitations="where the variance has not settled by freeze_step; and with any optimizer but plain SGD, "
    "since Adam's step is in the estimate",
)
def onebit_adam(
    freeze_step: int = 1000,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    bits: int = 1,
    block: int = 512,
) -> Method:
    """Adam whose momentum is sent in one bit per value once its variance has settled.

    See :class:`distcomp.methods.OneBitAdam`. Attach it with plain ``torch.optim.SGD(lr)``: the learning
    rate is Adam's. ``freeze_step`` is when the variance freezes (15 to 25 % of all steps), ``betas`` and
    ``eps`` are Adam's, ``bits`` and ``block`` those of :class:`distcomp.compressors.Quantize`, with error
    feedback.
    """
    inner = ErrorFeedback(from_compressor(Quantize(bits, block, plain=PLAIN.roles)))
    return OneBitAdam(inner, freeze_step, betas, eps)
