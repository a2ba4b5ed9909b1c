"""DeMo: what of the momentum moves fast is sent, the slow rest stays where it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distcomp.collectives import AllGather, Rounds
from distcomp.compressors import Chain, Compressor
from distcomp.compressors.dct import DctTopK
from distcomp.compressors.topk import with_values
from distcomp.errors import DistcompError
from distcomp.layout import FlatBuffer, Layout
from distcomp.methods.base import AggregateResult, Method, State, StepContext
from distcomp.methods.basic import except_small
from distcomp.methods.registry import register
from distcomp.payload import Payload

if TYPE_CHECKING:
    from torch.optim.optimizer import Optimizer


@dataclass(frozen=True)
class DecoupledMomentum(Method):
    """Send the largest cosine coefficients of a local momentum, and take them out of it::

        d <- beta d + g
        q_i = the k largest DCT coefficients of each chunk of d;      d <- d - DCT^-1(q_i)
        Q_c = the mean of q_i,c over the ranks that sent coefficient c
        estimate = DCT^-1(Q), or its sign

    The mean is over *senders*: a coefficient that one rank sent counts in full. The estimate is a momentum
    already: the optimizer must be SGD with momentum 0. With ``sign`` (the paper's) choose a learning rate as
    for Adam. One tensor of the model's size per rank.

    On the wire: ``n-1`` payloads of :class:`distcomp.compressors.DctTopK`: about ``k (4 + 9/8)`` bytes per
    chunk of 4096.

    **Contributions.** Without sign, a rank's is n times its share of each mean, ``n DCT^-1(q_i / senders)``;
    with it, all have the estimate itself. Either way they sum to n times the estimate. What was not sent
    stays in d: no error feedback.

    Source: Peng et al., "DeMo: decoupled momentum optimization", 2024. We differ: the learning rate is not
    inside d (with it, d and the step shrink together), packed indices, values added in rank order (the
    reference's scatter is not deterministic on a GPU).

    **Values in few bits.** ``select`` may be a :class:`distcomp.compressors.Chain`: ``q_i`` is then what its
    values decode to, and what rounding missed stays in d as well. One bit is the sign times the mean
    magnitude of 512 values (``int1``), or the mean of those of either sign (``onebit``).

    Raises DistcompError for a decay outside [0, 1), and for coefficients that are chosen by another
    transform.
    """

    select: DctTopK | Chain
    decay: float = 0.999
    sign: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.select, Chain) and not isinstance(self.select.sparsifier, DctTopK):
            raise DistcompError("the momentum's coefficients are chosen by a DctTopK; chain values to that")
        if not 0 <= self.decay < 1:
            raise DistcompError(
                f"the momentum's decay lies in [0, 1), not {self.decay}; the paper takes 0.999"
            )

    @property
    def transform(self) -> DctTopK:
        """What chooses the coefficients, whatever their values travel as."""
        chosen = self.select.sparsifier if isinstance(self.select, Chain) else self.select
        assert isinstance(chosen, DctTopK)
        return chosen

    def check(self, optimizer: Optimizer | None) -> None:
        if optimizer is not None and any(group.get("momentum") for group in optimizer.param_groups):
            raise DistcompError(
                "the momentum would be applied twice; with demo give the optimizer momentum=0"
            )

    def init(self, layout: Layout) -> State:
        return {"momentum": FlatBuffer(torch.zeros(layout.numel, dtype=torch.float32), layout)}

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        layout = context.layout
        d = self.decay * state["momentum"].data + x
        q = self.select.encode(d, layout, context.private)
        payloads: list[Payload] = yield AllGather(q)

        # Payload after payload, in rank order: every rank adds the same numbers in the same order. Within one
        # payload no position occurs twice, so that the indexed sum is deterministic on a GPU, too.
        total, senders = torch.zeros_like(x), torch.zeros_like(x)
        for payload in payloads:
            where = self.select.positions(payload, layout)
            total[where] += self.select.values(payload, layout)
            senders[where] += 1
        Q = total / senders.clamp(min=1)
        agreed = self.transform.inverse(Q, layout)
        estimate = agreed.sign() if self.sign else agreed

        def contribution() -> Tensor:
            if self.sign:
                return agreed.sign()
            own = torch.zeros_like(x)
            where = self.select.positions(q, layout)
            own[where] = context.size * self.select.values(q, layout) / senders[where]
            return self.transform.inverse(own, layout)

        # What is taken out is what was sent, not what was agreed: the rest of q's mean is the others' own.
        kept = FlatBuffer(d - self.select.decode(q, layout), layout)
        return AggregateResult(estimate, contribution, {"momentum": kept})

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        return (size - 1) * self.select.wire_bytes(layout)


@register(
    paper="Peng et al., DeMo: decoupled momentum optimization, 2024",
    wire="(n-1) d/4096 k (4 + 9/8); values in 8 bits 1, in one 1/8 for the 4",
    summable=False,
    biased=True,
    direction=True,
    deviations="the learning rate is not inside the momentum; packed indices; biases and norms in float32",
    limitations="with momentum in the optimizer, which then counts twice; steps of one size need a small "
    "learning rate at the end",
)
def demo(
    k: int = 32,
    side: int = 64,
    decay: float = 0.999,
    sign: bool = True,
    values: str | Compressor = "fp32",
) -> Method:
    """Send the largest cosine coefficients of a local momentum; step by the sign of what was agreed.

    ``k`` per chunk of ``side`` by ``side``, ``decay`` of the momentum, ``sign`` or not; ``values``: ``fp32``,
    ``int8``, ``int1``, ``onebit`` or another compressor of the coefficients. Set the optimizer's momentum to
    0. See :class:`DecoupledMomentum`.
    """
    select = with_values(DctTopK(k, side), values)
    assert isinstance(select, DctTopK | Chain)
    return except_small(DecoupledMomentum(select, decay, sign))
