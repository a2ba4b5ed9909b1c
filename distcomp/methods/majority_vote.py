"""signSGD with majority vote: each rank has one vote on the sign of every element."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.collectives import AllGather, AllToAll, Rounds
from distcomp.compressors.grid import pack_signs, per_parameter_mean, sign_bytes, spread, unpack_signs
from distcomp.errors import DistcompError
from distcomp.kernels.two_means import SIGNS
from distcomp.layout import Layout, chunk_views
from distcomp.methods.base import AggregateResult, Method, State, StepContext, all_reduce_bytes, mean
from distcomp.methods.basic import except_small
from distcomp.methods.registry import register
from distcomp.payload import Part, Parts, Payload, wire_bytes

MAGNITUDES = ("mean", "one")
"""What a sign is multiplied by."""


@dataclass(frozen=True)
class MajorityVote(Method):
    """The sign that most ranks hold, times one magnitude per parameter::

        v_j = sign(sum_i sign(x_i)_j),    estimate = s v,    sign(0) = +1 (a tie too)

    where ``s`` is the mean over ranks of the parameter's ``|x_i|_1 / d`` (``magnitude="mean"``), or 1
    (``magnitude="one"``, the paper's: choose a learning rate as for Adam). A parameter that is zero on every
    rank is left alone: its ``s`` is 0.

    Votes are packed bits, swapped so that the owner of a chunk counts them, and the result is gathered: on
    the wire ``2 (n-1)/n d/8`` bytes, and an all-reduce of 4 bytes per parameter. It keeps no state.

    **Contributions.** A rank's own votes, ``s sign(x_i)``, sum to ``s`` times the count, not to n times the
    result. The difference is made where the rounding happens: the owner of a chunk adds ``s (n v - count)``
    to its own there, so that the law holds exactly (counts are integers). A vote does not weigh how much is
    owed, so error feedback does not repair it: an outvoted debt stays.

    Source: Bernstein et al., "signSGD: compressed optimisation for non-convex problems", ICML 2018; "signSGD
    with majority vote", ICLR 2019. We differ: ``magnitude="mean"`` is the default, which keeps SGD's learning
    rates.

    Raises DistcompError for an unknown magnitude.
    """

    magnitude: str = "mean"

    def __post_init__(self) -> None:
        if self.magnitude not in MAGNITUDES:
            raise DistcompError(f"a vote counts with the magnitude mean or one, not {self.magnitude!r}")

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        scale = yield from mean(per_parameter_mean(x, context.layout), context)
        if self.magnitude == "one":
            scale = (scale > 0).float()  # a parameter that is zero everywhere is left alone here, too

        chunks = context.layout.split(context.size, SIGNS)
        ballots = tuple(_ballot(view) for view in chunk_views(x, chunks))
        received: list[Payload] = yield AllToAll(ballots)
        # Counts of +1 and -1 are whole numbers: float32 adds them exactly, in any order.
        count = torch.zeros(chunks[context.rank].numel, device=x.device, dtype=torch.float32)
        for ballot in received:
            unpack_signs(ballot["codes"], count, add=True)

        results: list[Payload] = yield AllGather(
            _ballot(count), parts=tuple(_parts(chunk.numel) for chunk in chunks)
        )
        vote = torch.empty_like(x)
        for view, result in zip(chunk_views(vote, chunks), results, strict=True):
            unpack_signs(result["codes"], view)

        magnitude = spread(scale, context.layout)

        def contribution() -> Tensor:
            own = torch.where(x >= 0, torch.ones_like(x), -1.0)
            owned = chunk_views(own, chunks)[context.rank]
            owned += context.size * chunk_views(vote, chunks)[context.rank] - count
            return own * magnitude

        return AggregateResult(vote * magnitude, contribution, state)

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        """The mean over the ranks: chunks differ by a block at most."""
        sizes = [wire_bytes(_parts(chunk.numel)) for chunk in layout.split(size, SIGNS)]
        return round(2 * sum(sizes) * (size - 1) / size) + all_reduce_bytes(4 * len(layout.slices), size)


def _parts(numel: int) -> Parts:
    return (Part("codes", torch.uint8, sign_bytes(numel)),)


def _ballot(x: Tensor) -> Payload:
    """The signs of ``x`` as a payload."""
    payload = Payload.empty(_parts(x.numel()), x.device)
    pack_signs(x, payload["codes"])
    return payload


@register(
    paper="Bernstein et al., signSGD with majority vote, ICLR 2019",
    wire="2 (n-1)/n (d/8 + 4 per parameter)",
    summable=False,
    biased=True,
    deviations="the vote is multiplied by the mean magnitude of each parameter (magnitude='one' does not); "
    "biases and norms in float32; momentum before the sign (Signum) is not here",
    limitations="the sign of the majority is not the sign of the mean, and nothing is owed: few ranks or "
    "skewed noise stop it short of the optimum",
)
def majority_vote(magnitude: str = "mean") -> Method:
    """Send signs; every element takes the sign that most ranks hold.

    ``magnitude`` is ``mean`` or ``one``. See :class:`MajorityVote`.
    """
    return except_small(MajorityVote(magnitude))
