"""PowerSGD: matrices as the product of two thin ones, found by one step of power iteration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from distcomp.collectives import AllReduce, Rounds
from distcomp.errors import DistcompError
from distcomp.kernels import lowrank, memory
from distcomp.kernels.pieces import Moves, move
from distcomp.layout import Layout, ParamSlice
from distcomp.methods.base import (
    SHAPES,
    AggregateResult,
    Method,
    PerParameter,
    State,
    StepContext,
    all_reduce_bytes,
)
from distcomp.methods.feedback import ErrorFeedback
from distcomp.methods.registry import register
from distcomp.schedule import Schedule, extremes, varying, whole

VALUES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What factors, and all that is not compressed, may be sent in."""


Both = tuple[Tensor, Tensor]
"""What goes as it is, and factors."""

Sent = tuple[Tensor, Tensor, Tensor]
"""Of a flat buffer: what goes as it is, all factors P and all Q."""


@dataclass(frozen=True)
class PowerSGD(Method):
    """Send each matrix as the product of two thin ones; warm start makes the steps a power iteration.

    A gradient of shape ``(a, ...)`` is a matrix ``M_i`` of a rows and b columns on rank i; r is the rank::

        Q = orthonormal(Q)                      # the last step's, the same on every rank
        P = orthonormal(mean_i(M_i Q))          # a x r, first all-reduce
        Q = mean_i(M_i^T P)                     # b x r, second all-reduce
        estimate = P Q^T,   contribution_i = P (M_i^T P)^T

    ``one_round=True`` alternates the halves, one in each step: ``P = mean_i(M_i Q)``, estimate ``P Q^T``
    in even steps, ``Q = mean_i(M_i^T P)`` with an orthonormal P in odd ones.

    All matrices of a flat buffer share one all-reduce per round. What is not compressed rides the first one
    in float32: parameters of one dimension or none, and matrices for which ``r (a+b) min_compression > a b``.
    On the wire, per flat buffer: ``2 (n-1)/n 4r(a+b)`` bytes summed over matrices (``one_round``: ``4ra`` and
    ``4rb`` in turn).

    ``values="bf16"`` sends all of it in bfloat16, half of the bytes. What is summed is ``round(x_i / n)``,
    and the contribution is made of what was rounded, so that error feedback owes what rounding took. What the
    sum itself rounds on its way nobody owes.

    A column of Q that is zero (in the first step, after a gradient that was zero, where ``rank`` has grown)
    is drawn anew from the key that all ranks share. ``rank`` may be a Schedule.

    Source: Vogels, Karimireddy & Jaggi, NeurIPS 2019; one round: epfml/powersgd. We differ: Q is made
    orthonormal before it is used (the span is the same, float32 holds it better); a column of zeros is drawn
    anew, where theirs stays zero; the contribution is the rank's own product (the paper's code,
    epfml/powersgd and PyTorch's hook subtract the mean's: the sum over ranks is the same); ``one_round``
    decides by ``min_compression`` on both halves, ``4r(a+b)``, though a step sends one of them. The
    orthonormal P is computed by every rank from the same bits: ranks need the same torch build and kind of
    CPU.

    Raises DistcompError for a rank below 1, and for parameters that arrive in pieces: their matrices are
    unknown.
    """

    rank: int | Schedule = 4
    min_compression: float = 2.0
    one_round: bool = False
    values: str = "fp32"

    needs = frozenset({SHAPES})
    may_overwrite = True
    adds_residual = True
    sums_nonfinite = True  # also times 0: each value of a matrix is in a sum of P, or of Q, or goes as it is

    def __post_init__(self) -> None:
        if extremes(self.rank)[0] < 1:
            raise DistcompError(f"powersgd needs a rank of 1 or more, not {self.rank}; 4 is a good start")
        if self.values not in VALUES:
            raise DistcompError(
                f"powersgd sends values in {' or '.join(VALUES)}, not {self.values!r}; choose one of them"
            )
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
        plan = _plan(context.layout, whole(self.rank, context.step), self.min_compression)
        exchange = self._one_round if self.one_round else self._two_rounds
        return (yield from exchange(x, plan, state, context))

    def _two_rounds(
        self, x: Tensor, plan: _Plan, state: State, context: StepContext
    ) -> Rounds[AggregateResult]:
        # Orthonormal, where the paper leaves Q as it is: float32 holds a span best by an orthonormal basis.
        q = plan.starts(state["q"], "q", context)
        m, plain, p_own = plan.times_rows(q, x, context.residual)
        (plain, p_own), (plain_mean, p) = yield from self._means(plain, p_own, context)
        # Every rank does this to the same bits, so that P need not be sent a second time.
        p = plan.orthonormal(p, "p")

        # Q is left as it is, unlike P: the estimate is P Q^T, so Q carries the singular values.
        q_own = lowrank.each_times_columns(p, m, plan.products)
        (_, q_own), (_, q_mean) = yield from self._means(x[:0], q_own, context)
        new = {**state, "q": plan.kept(state["q"], "q", q_mean)}
        # The rank's own Q, not the mean's: what this rank's residual keeps is its own error alone.
        return plan.result(x, m, (plain_mean, p, q_mean), (plain, p, q_own), new, context)

    def _one_round(
        self, x: Tensor, plan: _Plan, state: State, context: StepContext
    ) -> Rounds[AggregateResult]:
        even = context.step % 2 == 0
        given, made = ("q", "p") if even else ("p", "q")
        fixed = plan.starts(state[given], given, context)
        times = plan.times_rows if even else plan.times_columns
        m, plain, own = times(fixed, x, context.residual)
        (plain, own), (plain_mean, mean) = yield from self._means(plain, own, context)
        new = {**state, made: plan.kept(state[made], made, mean)}
        theirs, ours = ((mean, fixed), (own, fixed)) if even else ((fixed, mean), (fixed, own))
        return plan.result(x, m, (plain_mean, *theirs), (plain, *ours), new, context)

    def _means(self, plain: Tensor, factors: Tensor, context: StepContext) -> Rounds[tuple[Both, Both]]:
        """What is summed of this rank's, n times, and the means of both, by one all-reduce.

        Values are rounded when they are divided by n. The mean factors get memory of their own: a product's
        last bits depend on how its operands are aligned.
        """
        at = plain.numel()
        own = torch.cat([plain, factors]) if at else factors
        if own.numel() == 0:
            return (plain, factors), (plain, factors)
        sent = (own * (1.0 / context.size)).to(VALUES[self.values])
        if self.values != "fp32":
            own = sent.float().mul_(context.size)
        total: Tensor = yield AllReduce(sent)
        mean = total.float()
        return (own[:at], own[at:]), (mean[:at], mean[at:].clone())

    def _ranks(self, layout: Layout, step: int) -> dict[str, int]:
        return _worth(layout, whole(self.rank, step), self.min_compression)

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        ranks = self._ranks(layout, step)
        sides = {s.name: _sides(s) for s in layout.slices if s.name in ranks}
        plain = sum(param.numel for param in layout.slices if param.name not in ranks)
        p, q = (sum(rank * sides[name][side] for name, rank in ranks.items()) for side in (0, 1))
        if self.one_round:
            p, q = (q, 0) if step % 2 else (p, 0)
        each = VALUES[self.values].itemsize
        return all_reduce_bytes(each * (plain + p), size) + all_reduce_bytes(each * q, size)


@lru_cache(maxsize=256)
def _worth(layout: Layout, rank: int, min_compression: float) -> dict[str, int]:
    """The matrices that shrink enough, with their ranks."""
    ranks = {}
    for param in filter(_is_matrix, layout.slices):
        a, b = _sides(param)
        r = min(rank, a, b)  # a matrix of fewer rows or columns has no more rank than these
        if r * (a + b) * min_compression <= a * b:
            ranks[param.name] = r
    return ranks


ALIGNED = 16
"""Elements of 64 bytes. LAPACK's last bits depend on how a matrix is aligned: one call serves all of a shape
where each of them then begins on such a boundary, as it does alone."""


@dataclass(frozen=True)
class _Group:
    """Matrices of one shape, side by side: what one of them needs, one call does for all."""

    names: tuple[str, ...]
    rank: int
    a: int
    b: int

    def rows(self, side: str) -> tuple[int, int, int]:
        """How many factors there are on a side, their rank and their length."""
        return len(self.names), self.rank, self.a if side == "p" else self.b


@dataclass(frozen=True, eq=False)
class _Plan:
    """Where the matrices of a flat buffer lie, and their factors, which follow one another in a tensor of
    their own, those of one shape side by side: made once per layout and rank, so that a step costs what its
    bytes cost."""

    groups: tuple[_Group, ...]
    products: lowrank.Products
    plain: Moves
    """From the flat buffer to the values that are not compressed, laid end to end."""

    @cached_property
    def _sizes(self) -> dict[str, list[int]]:
        """The elements of each group's factors, by side."""
        return {side: [math.prod(group.rows(side)) for group in self.groups] for side in ("p", "q")}

    def each_group(self, factors: Tensor, side: str) -> Iterator[tuple[_Group, Tensor]]:
        """The factors of each group, ``[matrices, rank, length]``: views."""
        for group, part in zip(self.groups, factors.split_with_sizes(self._sizes[side]), strict=True):
            yield group, part.view(group.rows(side))

    def plain_of(self, x: Tensor) -> Tensor:
        """What is sent as it is."""
        out = torch.empty(self.plain.ends[1], device=x.device, dtype=torch.float32)
        move(x, out, self.plain)
        return out

    def times_rows(self, q: Tensor, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """``M``, which is x and the residual, where there is one; what of it goes as it is; and ``M Q`` of
        each matrix, multiplied in the pass that adds."""
        if residual is None:
            return x, self.plain_of(x), lowrank.each_times_rows(q, x, self.products)
        m, plain = memory.empty(x.numel(), x.device), self.plain_of(x).add_(self.plain_of(residual))
        move(plain, m, self.plain.back)
        return m, plain, lowrank.each_times_rows(q, x, self.products, (residual, m))

    def times_columns(self, p: Tensor, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The same with ``M^T P``."""
        m = x if residual is None else torch.add(x, residual, out=memory.empty(x.numel(), x.device))
        return m, self.plain_of(m), lowrank.each_times_columns(p, m, self.products)

    def result(
        self, x: Tensor, m: Tensor, theirs: Sent, ours: Sent, state: State, context: StepContext
    ) -> AggregateResult:
        """The estimate of what all sent, this rank's contribution, and what of ``m`` it then owes, where a
        residual was added."""
        estimate, owed = self.together(x, *theirs, context.out), None
        if context.residual is not None:
            self.subtract_contribution(m, *ours)
            owed = m
        return AggregateResult(
            estimate,
            lambda: self.together(x, *ours),
            state,
            lambda given: self.subtract_contribution(given, *ours),
            owed,
        )

    def together(
        self, like: Tensor, plain: Tensor, p: Tensor, q: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """The flat buffer of what went plainly and of the products ``P Q^T``."""
        if out is None:
            out = memory.empty(like.numel(), like.device)
        move(plain, out, self.plain.back)
        lowrank.each_outer(p, q, out, self.products)
        return out

    def subtract_contribution(self, given: Tensor, plain: Tensor, p: Tensor, q: Tensor) -> None:
        """Take the contribution off a flat buffer: the products, and what went plainly."""
        move(self.plain_of(given).sub_(plain), given, self.plain.back)
        lowrank.each_subtract_outer(p, q, given, self.products)

    def kept(self, old: PerParameter, side: str, factors: Tensor) -> PerParameter:
        """The factors for the next step; rows beyond the present rank are zero, so that they are drawn when
        they are needed."""
        new = PerParameter(old)
        for group, rows in self.each_group(factors, side):
            missing = old[group.names[0]].shape[0] - group.rank
            padded = torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
            new.update(zip(group.names, padded.unbind(), strict=True))
        return new

    def starts(self, factors: PerParameter, side: str, context: StepContext) -> Tensor:
        """The orthonormal factors to multiply with; what is zero of them is drawn by all ranks alike."""
        if not self.groups:
            return torch.empty(0, dtype=torch.float32)
        some = factors[self.groups[0].names[0]]
        flat = torch.empty(self.products.numels[side], dtype=torch.float32, device=some.device)
        for group, rows in self.each_group(flat, side):
            count, rank, length = rows.shape
            kept = torch.cat([factors[name] for name in group.names]).view(count, -1, length)
            rows.copy_(kept[:, :rank])
            _enliven(rows, group.names, context)
        return self.orthonormal(flat, side)

    def orthonormal(self, factors: Tensor, side: str) -> Tensor:
        """:func:`orthonormal` of each factor; those of one shape in one call."""
        out = torch.empty_like(factors)
        groups = zip(self.each_group(factors, side), self.each_group(out, side), strict=True)
        for (_, rows), (_, to) in groups:
            if rows[0].numel() % ALIGNED == 0:
                to.copy_(orthonormal(rows))
            else:
                for factor, orthogonal in zip(rows, to, strict=True):
                    orthogonal.copy_(orthonormal(factor))
        return out


def _plan(layout: Layout, rank: int, min_compression: float) -> _Plan:
    return layout.remember(("powersgd", rank, min_compression), lambda: _make(layout, rank, min_compression))


def _make(layout: Layout, rank: int, min_compression: float) -> _Plan:
    ranks = _worth(layout, rank, min_compression)
    alike: dict[tuple[int, int, int], list[tuple[str, int]]] = {}
    plain, plain_at = [], 0
    for param, at in zip(layout.slices, layout.offsets, strict=True):
        if param.name in ranks:
            alike.setdefault((ranks[param.name], *_sides(param)), []).append((param.name, at))
        else:
            plain.append((at, plain_at, param.numel))
            plain_at += param.numel
    groups = [_Group(tuple(name for name, _ in members), *shape) for shape, members in alike.items()]
    products = [(*shape, at) for shape, members in alike.items() for _, at in members]
    return _Plan(tuple(groups), lowrank.Products(tuple(products)), Moves(tuple(plain)))


def orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows with the same span (``[..., r, n]``, r <= n). Householder: neither dependence nor
    zeros break it."""
    columns: Tensor = torch.linalg.qr(rows.mT).Q
    return columns.mT.contiguous()


def _enliven(rows: Tensor, names: tuple[str, ...], context: StepContext) -> None:
    """Fresh noise for rows that are zero, in place: ``[matrices, rank, length]``, a key for each matrix."""
    on_cpu = rows.device.type == "cpu"
    if on_cpu and rows[..., 0].all():  # what does not begin with a zero is not zero
        return
    alive = rows.any(dim=2, keepdim=True)
    # A GPU is not waited for: all are drawn.
    dead = (~alive).any(dim=1).view(-1).nonzero().view(-1).tolist() if on_cpu else range(len(names))
    generator = torch.Generator()
    for i in dead:
        generator.manual_seed(context.shared.fold("powersgd", names[i]).seed)
        noise = torch.randn(rows.shape[1:], generator=generator, dtype=torch.float32)
        rows[i] = torch.where(alive[i], rows[i], noise.to(rows.device, non_blocking=True))


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
    wire="2 (n-1)/n 4r(a+b) per matrix of a rows and b columns, r = rank; half of that with one_round, and "
    "with values=bf16",
    summable=True,
    biased=True,
    deviations="Q is made orthonormal before use; a column that is zero is drawn anew; each rank owes "
    "against its own product (epfml/powersgd and PyTorch's hook: against the mean's); one_round counts both "
    "halves in min_compression",
    limitations="vectors and small matrices do not shrink; gradients of high rank come through slowly, "
    "the more so at rank 1 in one round",
)
def powersgd(
    rank: int | str | Schedule = 4,
    min_compression: float = 2.0,
    one_round: bool = False,
    values: str = "fp32",
    error_feedback: bool = True,
) -> Method:
    """Send each matrix as the product of two thin ones; warm start makes the steps a power iteration.

    See :class:`distcomp.methods.PowerSGD`. ``rank`` is a number or a schedule (``"8 -> 4 @ 1000"``);
    ``min_compression``: a matrix that would not shrink by this factor is sent as it is; ``one_round`` sends
    one factor per step instead of both; ``values="bf16"`` sends half of the bytes; ``error_feedback=False``
    forgets what was not sent.
    """
    number = varying(rank)
    most = number if isinstance(number, Schedule) else round(number)
    method = PowerSGD(most, min_compression, one_round, values)
    return ErrorFeedback(method) if error_feedback else method
