"""EF21: every rank keeps what the others know of its gradient, and sends the compressed difference."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distcomp.collectives import Rounds
from distcomp.compressors import Compressor, TopK
from distcomp.compressors.contraction import needed_contraction
from distcomp.errors import DistcompError
from distcomp.layout import FlatBuffer, Layout
from distcomp.methods.base import AggregateResult, Method, State, StepContext
from distcomp.methods.basic import except_small
from distcomp.methods.from_compressor import from_compressor
from distcomp.methods.registry import compressor_of, register


@dataclass(frozen=True)
class EF21(Method):
    """Send the compressed difference between the gradient and what the others already know of it.

    ::

        v_i <- (1 - eta) v_i + eta x_i                      # EF21-SGDM; with eta = 1, v_i = x_i: EF21
        c_i  = C(v_i - g_i);    g_i <- g_i + c_i;    g <- g + mean_i(c_i)
        estimate = g,    contribution_i = g_i

    ``g_i`` and ``g`` begin at zero, so that the first message is ``C(x_i)``. C must contract; an unbiased
    one that does not is damped, ``c_i = C(...) / (1 + omega)`` with each parameter's omega. With noisy
    gradients take ``eta < 1``: without it EF21 need not converge. The estimate lags behind the gradient and
    is never exact where C is not.

    On the wire: the payload of ``compressor`` by ``pattern``. Memory: ``g_i``, ``g``, and ``v_i`` where
    ``eta < 1``, float32 ``[layout.numel]`` each.

    Source: Richtárik, Sokolov & Fatkhullin, "EF21", NeurIPS 2021; momentum: Fatkhullin, Tyurin & Richtárik,
    NeurIPS 2023. We differ: ``g_i`` begins at 0, not at an uncompressed gradient; a second stage's error
    (``pattern="reduce_scatter"``) is in its owner's ``g_i``.

    Raises DistcompError for an eta outside (0, 1], and for a compressor that declares neither a contraction
    nor a variance.
    """

    compressor: Compressor
    pattern: str = "auto"
    eta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.eta <= 1:
            raise DistcompError(f"eta lies in (0, 1], not {self.eta}; 1 is EF21 without momentum")
        self._damping(2**20)
        from_compressor(self.compressor, self.pattern)

    def _damping(self, numel: int) -> float:
        """1 for a contraction; 1/(1+omega) makes one of what is unbiased."""
        return needed_contraction(self.compressor, numel, "ef21").damping

    def init(self, layout: Layout) -> State:
        kept = ("own", "mean") if self.eta == 1 else ("own", "mean", "momentum")
        return {name: FlatBuffer(torch.zeros(layout.numel, dtype=torch.float32), layout) for name in kept}

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        new = dict(state)
        if self.eta < 1:
            x = torch.lerp(state["momentum"].data, x, self.eta)
            new["momentum"] = FlatBuffer(x, context.layout)
        kept = replace(context, error_feedback=True)  # what is not sent now is still in the next difference
        result = yield from from_compressor(self.compressor, self.pattern).aggregate(
            x - state["own"].data, {}, kept
        )
        # The contribution is all of g_i, not the difference just sent: the estimate is the mean of the g_i.
        own = state["own"].data + self._damped(result.contribution(), context.layout)
        mean = state["mean"].data + self._damped(result.estimate, context.layout)
        new |= {"own": FlatBuffer(own, context.layout), "mean": FlatBuffer(mean, context.layout)}
        # A copy: the caller may write into the estimate, and the mean is state.
        return AggregateResult(mean.clone(), lambda: own, new)

    def _damped(self, difference: Tensor, layout: Layout) -> Tensor:
        for param, piece in layout.pieces(difference):
            # By the whole parameter's size, not the piece's: buckets that are cut otherwise damp alike.
            factor = self._damping(math.prod(param.shape))
            if factor != 1:
                piece.mul_(factor)
        return difference

    def sole_compressor(self) -> Compressor:
        return self.compressor

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        return from_compressor(self.compressor, self.pattern).payload_bytes(layout, size, step)


SPARSE = TopK(0.01)
"""The paper's compressor, unless another is given."""


@register(
    paper="Richtárik, Sokolov & Fatkhullin, EF21, NeurIPS 2021; momentum: Fatkhullin et al., 2023",
    wire="that of the compressor, by the pattern",
    summable=False,
    biased=True,
    deviations="begins at zero instead of an uncompressed gradient; from three ranks on the mean is encoded "
    "a second time; biases and norms in float32",
    limitations="with noisy gradients and eta = 1: the difference to what is known stays as large as the "
    "noise",
)
def ef21(compressor: Compressor | str = SPARSE, pattern: str = "auto", eta: float = 1.0) -> Method:
    """Send the compressed difference between the gradient and what the others already know of it.

    See :class:`distcomp.methods.EF21`. ``compressor`` is one, or the text of one (``"topk:ratio=0.05"``,
    ``"quantize:bits=1"``); ``pattern`` is how its payloads meet; ``eta``: weight of the newest gradient in
    the momentum that is sent instead of it (1: none; 0.1 is usual with noisy gradients).
    """
    return except_small(EF21(compressor_of(compressor), pattern, eta))
