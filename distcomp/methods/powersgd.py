"""PowerSGD: matrices as the product of two thin ones, found by one step of power iteration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from distcomp.collectives import Rounds
from distcomp.errors import DistcompError
from distcomp.kernels import lowrank
from distcomp.layout import Layout, ParamSlice
from distcomp.methods.base import (
    SHAPES,
    AggregateResult,
    Method,
    PerParameter,
    State,
    StepContext,
    all_reduce_bytes,
    mean,
)
from distcomp.methods.feedback import ErrorFeedback
from distcomp.methods.registry import register
from distcomp.randomness import Key
from distcomp.schedule import Schedule, extremes, varying, whole


@dataclass(frozen=True)
class PowerSGD(Method):
    """Send each matrix as the product of two thin ones; warm start makes the steps a power iteration.

    A gradient of shape ``(a, ...)`` is a matrix ``M_i`` of a rows and b columns on rank i; r is the rank::

        Q = orthonormal(Q)                      # the last step's, the same on every rank
        P = orthonormal(mean_i(M_i Q))          # a x r, first all-reduce
        Q = mean_i(M_i^T P)                     # b x r, second all-reduce
        estimate = P Q^T,   contribution_i = P (M_i^T P)^T

    ``one_round=True`` takes the halves in turn, one in each step: ``P = mean_i(M_i Q)``, estimate ``P Q^T``
    in even steps, ``Q = mean_i(M_i^T P)`` with an orthonormal P in odd ones.

    All matrices of a flat buffer share one all-reduce per round. What is not compressed rides the first one
    in float32: parameters of one dimension or none, and matrices for which ``r (a+b) min_compression > a b``.
    On the wire, per flat buffer: ``2 (n-1)/n 4r(a+b)`` bytes summed over matrices (``one_round``: ``4ra`` and
    ``4rb`` in turn).

    A column of Q that is zero (in the first step, after a gradient that was zero, where ``rank`` has grown)
    is drawn anew from the key that all ranks share. ``rank`` may be a Schedule.

    Source: Vogels, Karimireddy & Jaggi, NeurIPS 2019; one round: epfml/powersgd. We differ: Q is made
    orthonormal before it is used (the span is the same, float32 holds it better); a dead column is drawn
    anew, where theirs stays dead; the contribution is the rank's own product, as in epfml/powersgd (the
    paper's code and PyTorch's hook subtract the mean's: the sum over ranks is the same); ``one_round``
    decides by ``min_compression`` on both halves, ``4r(a+b)``, though a step sends one of them. The
    orthonormal P is computed by every rank from the same bits: ranks need the same torch build and kind of
    CPU.

    Raises DistcompError for a rank below 1, and for parameters that arrive in pieces (FSDP): their matrices
    are unknown.
    """

    rank: int | Schedule = 4
    min_compression: float = 2.0
    one_round: bool = False

    needs = frozenset({SHAPES})

    def __post_init__(self) -> None:
        if extremes(self.rank)[0] < 1:
            raise DistcompError(f"powersgd needs a rank of 1 or more, not {self.rank}; 4 is a good start")
        if self.min_compression < 0:
            raise DistcompError(
                f"min_compression is a ratio of sizes, not {self.min_compression}; 0 compresses always"
            )

    def init(self, layout: Layout) -> State:
        most = round(extremes(self.rank)[1])
        matrices = [param for param in layout.slices if _is_matrix(param)]
        state = {
            "q": PerParameter(
                {
                    m.name: torch.zeros(min(most, *_sides(m)), _sides(m)[1], dtype=torch.float32)
                    for m in matrices
                }
            )
        }
        if self.one_round:
            state["p"] = PerParameter(
                {
                    m.name: torch.zeros(min(most, *_sides(m)), _sides(m)[0], dtype=torch.float32)
                    for m in matrices
                }
            )
        return state

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        ranks = self._ranks(context.layout, context.step)
        matrices = {s.name: piece.view(_sides(s)) for s, piece in context.layout.pieces(x) if s.name in ranks}
        plain = [piece for param, piece in context.layout.pieces(x) if param.name not in ranks]
        exchange = self._one_round if self.one_round else self._two_rounds
        return (yield from exchange(x, plain, matrices, state, context))

    def _two_rounds(
        self, x: Tensor, plain: list[Tensor], matrices: dict[str, Tensor], state: State, context: StepContext
    ) -> Rounds[AggregateResult]:
        q = _starts(state["q"], self._ranks(context.layout, context.step), context)
        p_own = [lowrank.times_rows(one, m) for one, m in zip(q, matrices.values(), strict=True)]
        plain_mean, p = yield from _means(plain, p_own, context)
        p = [orthonormal(one) for one in p]

        q_own = [lowrank.times_columns(one, m) for one, m in zip(p, matrices.values(), strict=True)]
        _, q_mean = yield from _means([], q_own, context)
        return AggregateResult(
            _together(context.layout, x, plain_mean, matrices, p, q_mean),
            lambda: _together(context.layout, x, plain, matrices, p, q_own),
            {**state, "q": _kept(state["q"], matrices, q_mean)},
            lambda given: _deduct(given, context.layout, matrices, p, q_own),
        )

    def _one_round(
        self, x: Tensor, plain: list[Tensor], matrices: dict[str, Tensor], state: State, context: StepContext
    ) -> Rounds[AggregateResult]:
        even = context.step % 2 == 0
        given, made = ("q", "p") if even else ("p", "q")
        fixed = _starts(state[given], self._ranks(context.layout, context.step), context)
        times = lowrank.times_rows if even else lowrank.times_columns
        own = [times(f, m) for f, m in zip(fixed, matrices.values(), strict=True)]
        plain_mean, found = yield from _means(plain, own, context)

        def ordered(free: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            return (free, fixed) if even else (fixed, free)

        return AggregateResult(
            _together(context.layout, x, plain_mean, matrices, *ordered(found)),
            lambda: _together(context.layout, x, plain, matrices, *ordered(own)),
            {**state, made: _kept(state[made], matrices, found)},
            lambda given: _deduct(given, context.layout, matrices, *ordered(own)),
        )

    def _ranks(self, layout: Layout, step: int) -> dict[str, int]:
        return _worth(layout, whole(self.rank, step), self.min_compression)

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        ranks = self._ranks(layout, step)
        sides = {s.name: _sides(s) for s in layout.slices if s.name in ranks}
        plain = sum(param.numel for param in layout.slices if param.name not in ranks)
        p, q = (sum(rank * sides[name][side] for name, rank in ranks.items()) for side in (0, 1))
        if self.one_round:
            p, q = (q, 0) if step % 2 else (p, 0)
        return all_reduce_bytes(4 * (plain + p), size) + all_reduce_bytes(4 * q, size)


@lru_cache(maxsize=256)
def _worth(layout: Layout, rank: int, min_compression: float) -> dict[str, int]:
    """The matrices that shrink enough, with their ranks."""
    ranks = {}
    for param in filter(_is_matrix, layout.slices):
        a, b = _sides(param)
        r = min(rank, a, b)
        if r * (a + b) * min_compression <= a * b:
            ranks[param.name] = r
    return ranks


def _starts(factors: PerParameter, ranks: dict[str, int], context: StepContext) -> list[Tensor]:
    """The orthonormal factors to multiply with; what is zero of them is drawn by all ranks alike."""
    return [
        orthonormal(_alive(factors[name][:rank], context.shared.fold("powersgd", name)))
        for name, rank in ranks.items()
    ]


def orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows with the same span (r x n, r <= n). Householder: neither dependence nor zeros break
    it."""
    columns: Tensor = torch.linalg.qr(rows.T).Q
    return columns.T.contiguous()


def _alive(rows: Tensor, key: Key) -> Tensor:
    """The rows, with fresh noise for those that are zero."""
    alive = rows.any(dim=1, keepdim=True)
    if rows.device.type == "cpu" and alive.all():
        return rows
    noise = torch.randn(rows.shape, generator=key.generator(), dtype=torch.float32)
    return torch.where(alive, rows, noise.to(rows.device, non_blocking=True))


def _means(
    plain: list[Tensor], factors: list[Tensor], context: StepContext
) -> Rounds[tuple[list[Tensor], list[Tensor]]]:
    """The means of both, by one all-reduce.

    Factors get memory of their own: a product's last bits depend on how its operands are aligned.
    """
    pieces = plain + factors
    if not pieces:
        return [], []
    total = yield from mean(torch.cat([piece.reshape(-1) for piece in pieces]), context)
    means = [
        m.view_as(piece)
        for m, piece in zip(torch.split(total, [piece.numel() for piece in pieces]), pieces, strict=True)
    ]
    return means[: len(plain)], [factor.clone() for factor in means[len(plain) :]]


def _together(
    layout: Layout,
    like: Tensor,
    plain: Iterable[Tensor],
    matrices: Iterable[str],
    p: Iterable[Tensor],
    q: Iterable[Tensor],
) -> Tensor:
    """The flat buffer of what went plainly and of the products ``P Q^T``."""
    out = torch.empty_like(like)
    values, factors = iter(plain), dict(zip(matrices, zip(p, q, strict=True), strict=True))
    for param, piece in layout.pieces(out):
        if param.name in factors:
            left, right = factors[param.name]
            lowrank.outer(left, right, piece.view(_sides(param)))
        else:
            piece.copy_(next(values))
    return out


def _deduct(
    given: Tensor, layout: Layout, matrices: Iterable[str], p: Iterable[Tensor], q: Iterable[Tensor]
) -> None:
    """Take the contribution off a flat buffer: the products, and all of what went plainly."""
    factors = dict(zip(matrices, zip(p, q, strict=True), strict=True))
    for param, piece in layout.pieces(given):
        if param.name in factors:
            left, right = factors[param.name]
            lowrank.subtract_outer(left, right, piece.view(_sides(param)))
        else:
            piece.zero_()


def _kept(old: PerParameter, names: Iterable[str], factors: Iterable[Tensor]) -> PerParameter:
    """The factors for the next step; rows beyond the present rank are zero, so that they are drawn when
    they are needed."""
    new = PerParameter(old)
    for name, factor in zip(names, factors, strict=True):
        new[name] = torch.nn.functional.pad(factor, (0, 0, 0, old[name].shape[0] - factor.shape[0]))
    return new


def _sides(param: ParamSlice) -> tuple[int, int]:
    """Rows and columns: convolutions (out, in, height, width) have one row per output channel."""
    return param.shape[0], param.numel // param.shape[0]


def _is_matrix(param: ParamSlice) -> bool:
    if not param.whole:
        raise DistcompError(
            f"{param.name} arrives in pieces, and powersgd needs whole matrices; use qsgd, topk or another "
            "method that works element by element"
        )
    return len(param.shape) >= 2 and param.numel > 0


@register(
    paper="Vogels, Karimireddy & Jaggi, PowerSGD, NeurIPS 2019; one round: epfml/powersgd",
    wire="2 (n-1)/n 4r(a+b) per matrix of a rows and b columns, r = rank; half of that with one_round",
    summable=True,
    biased=True,
    deviations="Q is made orthonormal before use; a column that is zero is drawn anew; each rank owes "
    "against its own product (as epfml/powersgd; PyTorch's hook: against the mean's); one_round counts both "
    "halves in min_compression",
    limitations="vectors and small matrices do not shrink; gradients of high rank come through slowly, "
    "the more so at rank 1 in one round",
)
def powersgd(
    rank: int | str | Schedule = 4,
    min_compression: float = 2.0,
    one_round: bool = False,
    error_feedback: bool = True,
) -> Method:
    """Send each matrix as the product of two thin ones; warm start makes the steps a power iteration.

    See :class:`distcomp.methods.PowerSGD`. ``rank`` is a number or a schedule (``"8 -> 4 @ 1000"``);
    ``min_compression``: a matrix that would not shrink by this factor is sent as it is; ``one_round`` sends
    one factor per step instead of both; ``error_feedback=False`` forgets what was not sent.
    """
    number = varying(rank)
    method = PowerSGD(number if isinstance(number, Schedule) else round(number), min_compression, one_round)
    return ErrorFeedback(method) if error_feedback else method
