"""Error feedback: what was not sent today is owed tomorrow."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distcomp.collectives import Rounds
from distcomp.compressors.base import Compressor
from distcomp.errors import DistcompError
from distcomp.kernels import memory
from distcomp.layout import Layout
from distcomp.methods.base import AggregateResult, ByParameter, Method, State, StepContext
from distcomp.methods.residuals import check_form, kept
from distcomp.randomness import Key

RESIDUAL = "residual"
"""The name under which a state keeps what was not sent."""


def owed(cut: ByParameter, layout: Layout, like: Tensor) -> Tensor:
    """What a state owes: the sum of its residuals, as one flat buffer (float32, ``[layout.numel]``).

    ``cut``: the state by parameter, for methods keep residuals of some parameters only, each in a layout of
    its own. A residual of other numbers than the parameter's (of values drawn from it) is none of the sum.
    """
    total = torch.zeros_like(like)
    for param, piece in layout.pieces(total):
        for path, leaf in cut.get(param.name, {}).items():
            if path.rpartition("/")[2] == RESIDUAL and leaf.numel() == piece.numel():
                piece.add_(leaf)
    return total


@dataclass(frozen=True)
class ErrorFeedback(Method):
    """Add the residual, run the inner method, keep what it did not take.

    ::

        p_t     = x_t + decay e_t
        estimate, c_t = inner(p_t)
        e_{t+1} = (1 - beta) decay e_t + beta (p_t - c_t)

    With ``decay = beta = 1`` this is plain error feedback, ``e_{t+1} = p_t - c_t``: by the law of
    contributions, the sum over ranks of what was sent and of what is owed equals the sum of what came in, for
    every method. ``decay < 1`` lets old residuals fade; ``beta < 1`` is a low-pass filter: the residual
    follows slowly what was not sent, so that the ranks' residuals stay alike under a large learning rate.
    Either way a part is then forgotten, not owed. ``x``: float32 ``[layout.numel]``.

    ``kept``: the residual is ``float32``, or ``bf16`` or ``int8`` (blocks of 512 with a scale), rounded at
    random (:func:`distcomp.methods.residuals.kept`). The law then holds in expectation: what was sent and is
    owed is what came in plus the sum of all steps' rounding errors, each of mean zero given what came before
    and less than ``2^-7 |e_j|`` (``bf16``) or ``max|block| / 127`` (``int8``). With ``beta < 1`` and
    ``int8`` it is LoCo's moving average.

    On the wire: ``inner``'s bytes. Memory: 4, 2 or 1.01 bytes for each of the model's numbers per rank, and
    inner's; twice the float32 for the moment of an exchange.

    Source: Seide et al. 2014; Karimireddy et al. 2019; the decay: Sarfi et al., SparseLoCo, 2025; the filter:
    Chen et al., ScaleCom, NeurIPS 2020; 8 bits: Xie et al., LoCo, 2024. We differ: residuals are in units of
    the *unscaled* gradient and the learning rate is not inside (at a constant rate the two are the same); on
    a step that a GradScaler skips, nothing changes; what is kept in few bits is rounded at random.

    Raises DistcompError for a decay or a beta outside (0, 1], and for another form of the residual.
    """

    inner: Method
    decay: float = 1.0
    beta: float = 1.0
    kept: str = "float32"

    def __post_init__(self) -> None:
        check_form(self.kept)
        for name, value in (("decay", self.decay), ("beta", self.beta)):
            if not 0 < value <= 1:
                raise DistcompError(
                    f"{name} lies above 0 and at most at 1, not {value}; 1 is plain error feedback"
                )

    @property
    def may_overwrite(self) -> bool:  # type: ignore[override]
        return self.inner.may_overwrite

    @property
    def sums_nonfinite(self) -> bool:  # type: ignore[override]
        return self.inner.sums_nonfinite  # of x and a residual that is finite

    def init(self, layout: Layout) -> State:
        nothing = torch.zeros(layout.numel, dtype=torch.float32)
        return {
            RESIDUAL: kept(nothing, layout, self.kept, Key.of(0)),
            "inner": self.inner.init(layout),
        }

    def assumed_state(self, layout: Layout, step: int) -> State:
        return {**self.init(layout), "inner": self.inner.assumed_state(layout, step)}

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        old: Tensor = state[RESIDUAL].data
        # An encoder adds the residual in the pass in which it encodes. A two-stage method inside may leave
        # its second error with the owner of the chunk.
        added = self.beta == 1 and self.decay == 1 and self.inner.adds_residual
        corrected = x if added else torch.add(x, old, alpha=self.decay, out=memory.empty(x.numel(), x.device))
        inner = replace(context, error_feedback=True, residual=old if added else None)
        result = yield from self.inner.aggregate(corrected, state["inner"], inner)
        if self.beta == 1:
            # Else in place: a model's size less of memory.
            residual = result.owed if result.owed is not None else result.residual(corrected)

            def contribution() -> Tensor:
                return torch.add(x, old, alpha=self.decay) - residual

        else:
            # The filter needs both what was sent and what came in: nothing can be done in place.
            sent = result.contribution()
            residual = (1 - self.beta) * self.decay * old + self.beta * (corrected - sent)

            def contribution() -> Tensor:
                return sent

        left = kept(residual, context.layout, self.kept, context.private)
        new = {RESIDUAL: left, "inner": result.state}
        return AggregateResult(result.estimate, contribution, new)

    def sole_compressor(self) -> Compressor | None:
        return self.inner.sole_compressor()

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        return self.inner.payload_bytes(layout, size, step)
