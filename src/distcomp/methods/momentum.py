"""Deep gradient compression: momentum on the near side of a sparse exchange."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distcomp.compressors import Identity, TopK
from distcomp.compressors.sparse import check_ratio
from distcomp.compressors.topk import with_values
from distcomp.errors import DistcompError
from distcomp.exchange import Talk
from distcomp.layout import Layout, Slab
from distcomp.methods.base import Method, Outcome, State, Turn
from distcomp.methods.basic import PLAIN
from distcomp.methods.choose import Choose
from distcomp.methods.lift import GatherAndSum, lift
from distcomp.methods.registry import register


@dataclass(frozen=True)
class DeepGradient(Method):
    """Top-k of accumulated *momentum* instead of accumulated gradients::

        u <- m u + g;   v <- v + u                        momentum correction, local accumulation
        send v where it is among the k largest magnitudes of its parameter
        v <- 0, u <- 0  where it was sent                 momentum factor masking
        estimate = 1/n sum_i sent_i

    ``nesterov``: ``u <- m (u + g)``, ``v <- v + u + g``. ``clip > 0`` first scales a parameter's gradient
    down to the norm ``clip / sqrt(n)``. ``values`` are sent as ``fp32``, ``bf16``, ``fp16``, ``int8``,
    ``int4``, ``int2`` or ``sign``. The estimate is a momentum already: the optimizer must be SGD with
    momentum 0. Two tensors of the model's size per rank.

    On the wire: ``n-1`` payloads of :class:`distcomp.compressors.TopK`.

    Source: Lin et al., "Deep gradient compression", ICLR 2018. We differ: exactly k elements, always (the
    paper's sampled threshold varies), packed indices, each parameter clipped by itself; what rounding of
    ``values`` left over stays in v.

    Raises DistcompError for a density outside (0, 1], a momentum outside [0, 1), or a negative clip.
    """

    ratio: float = 0.001
    momentum: float = 0.9
    nesterov: bool = False
    clip: float = 0.0
    values: str = "fp32"

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        with_values(TopK(self.ratio), self.values)
        if not 0 <= self.momentum < 1:
            raise DistcompError(f"a momentum lies in [0, 1), not {self.momentum}; the usual is 0.9")
        if self.clip < 0:
            raise DistcompError(f"clip={self.clip} must not be negative; 0 does not clip")

    @property
    def sparse(self) -> Method:
        """How what is accumulated is exchanged."""
        return GatherAndSum(with_values(TopK(self.ratio), self.values))

    def init(self, layout: Layout) -> State:
        return {
            "momentum": Slab(torch.zeros(layout.numel), layout),
            "velocity": Slab(torch.zeros(layout.numel), layout),
        }

    def talk(self, x: Tensor, state: State, turn: Turn) -> Talk[Outcome]:
        g = self._clipped(x, turn)
        u, v = state["momentum"].data, state["velocity"].data
        if self.nesterov:
            u = self.momentum * (u + g)
            v = v + u + g
        else:
            u = self.momentum * u + g
            v = v + u
        outcome = yield from self.sparse.talk(v, {}, turn)
        sent = outcome.contribution()
        kept = {
            "momentum": Slab(torch.where(sent == 0, u, 0.0), turn.layout),
            "velocity": Slab(v - sent, turn.layout),
        }
        return replace(outcome, contribution=lambda: sent, state=kept)

    def _clipped(self, x: Tensor, turn: Turn) -> Tensor:
        if not self.clip:
            return x
        limit = self.clip * turn.size**-0.5
        pieces = []
        for _, piece in turn.layout.pieces(x):
            norm = torch.linalg.vector_norm(piece, dtype=torch.float64)  # squares of large values fit
            pieces.append(piece * (limit / norm).clamp(max=1.0).float())
        return torch.cat(pieces) if pieces else x

    def payload_bytes(self, layout: Layout, size: int) -> int:
        return self.sparse.payload_bytes(layout, size)


@dataclass(frozen=True)
class Momentum(Method):
    """Momentum on the estimate, ``u <- m u + estimate`` (Nesterov: ``m u + estimate`` again).

    For parameters that are sent whole beside :class:`DeepGradient`. A rank's contribution is the inner one
    plus the part of the momentum that was there before, so the law holds. Source: Lin et al., ICLR 2018
    (dense tensors).
    """

    inner: Method
    momentum: float
    nesterov: bool = False

    def init(self, layout: Layout) -> State:
        return {"momentum": Slab(torch.zeros(layout.numel), layout), "inner": self.inner.init(layout)}

    def talk(self, x: Tensor, state: State, turn: Turn) -> Talk[Outcome]:
        m, before = self.momentum, state["momentum"].data
        outcome = yield from self.inner.talk(x, state["inner"], turn)
        u = m * before + outcome.estimate
        own, past = (1 + m, m * m) if self.nesterov else (1.0, m)
        return Outcome(
            own * outcome.estimate + past * before,
            lambda: own * outcome.contribution() + past * before,
            {"momentum": Slab(u, turn.layout), "inner": outcome.state},
        )

    def payload_bytes(self, layout: Layout, size: int) -> int:
        return self.inner.payload_bytes(layout, size)


@register(
    paper="Lin et al., Deep gradient compression, ICLR 2018",
    wire="(n-1) k (4 + (2 + log2(d/k))/8), k = ratio d",
    summable=False,
    biased=True,
    differs="exactly k elements per parameter; packed indices; clipping per parameter",
)
def dgc(
    ratio: float = 0.001,
    momentum: float = 0.9,
    nesterov: bool = False,
    clip: float = 0.0,
    values: str = "fp32",
) -> Method:
    """Send the k largest elements of accumulated momentum, and clear what was sent.

    Set the optimizer's momentum to 0. See :class:`DeepGradient`. Biases and norms are sent in float32 and get
    their momentum after the exchange. The paper's warm-up of the density is a schedule of ``ratio``, over its
    first four epochs of 500 steps, say: ``"0.25 -> 0.0625 @ 500 -> 0.015625 @ 1000 -> 0.004 @ 1500 -> 0.001 @
    2000"``, or ``"0.25 *> 0.001 @ 2000"``.
    """
    sparse = DeepGradient(ratio, momentum, nesterov, clip, values)
    return Choose(PLAIN, Momentum(lift(Identity()), momentum, nesterov), sparse)
