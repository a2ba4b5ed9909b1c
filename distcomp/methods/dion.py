"""Dion: orthonormal steps of low rank; what a step leaves out of the momentum stays in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distcomp.collectives import Rounds
from distcomp.errors import DistcompError
from distcomp.layout import FlatBuffer, Layout, ParamSlice
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
from distcomp.methods.basic import except_small
from distcomp.methods.registry import register

if TYPE_CHECKING:
    from torch.optim.optimizer import Optimizer


@dataclass(frozen=True)
class Dion(Method):
    """Step along an orthonormal matrix of low rank, found by one step of power iteration on a momentum.

    A gradient of shape ``(a, ...)`` is a matrix ``G_i`` of a rows and b columns on rank i; r is the rank::

        B_i = M_i + G_i
        P   = orthonormal(mean_i(B_i Q))         # a x r, first all-reduce
        R_i = B_i^T P,   R = mean_i(R_i)         # b x r, second all-reduce
        M_i = B_i - (1 - mu) P R_i^T             # error feedback: what P has not caught decays nowhere
        Q   = R with columns of length 1         # the next step begins with it
        estimate = sqrt(a/b) P Q^T

    The estimate is a direction with momentum in it, whose r singular values are near 1: the optimizer must be
    SGD with momentum 0, and its learning rate is one for Muon. With r = min(a, b), ``M`` is heavy-ball
    momentum with factor mu and ``P Q^T`` goes to the polar factor of B that Muon computes, step by step. What
    is no matrix is sent as it is. One tensor of the model's size per rank, and Q.

    On the wire, per flat buffer: ``2 (n-1)/n 4r(a+b)`` bytes summed over matrices.

    **Contributions.** All have the estimate itself, which is n times it in sum: it is a direction, no mean.

    Source: Ahn, Xu, Abreu & Langford, "Dion: distributed orthonormalized updates", 2025, algorithm with power
    iteration; its code (microsoft/dion). We differ: a rank keeps its own ``R_i`` in M (the mean of all M is
    the same); a column of Q that is zero is drawn anew from the key that all ranks share; QR without its
    randomized sketch. The step itself, weight decay and learning rates are the optimizer's.

    Raises DistcompError for a rank below 1, a mu outside [0, 1), parameters that arrive in pieces, and an
    optimizer with momentum.
    """

    rank: int = 16
    mu: float = 0.95

    needs = frozenset({SHAPES})

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.mu < 1:
            raise DistcompError(
                f"dion has a rank of 1 or more and mu in [0, 1), not {self.rank} and {self.mu}; mu is "
                "usually 0.95"
            )

    def check(self, optimizer: Optimizer | None) -> None:
        if optimizer is not None and any(group.get("momentum") for group in optimizer.param_groups):
            raise DistcompError(
                "the momentum would be applied twice; with dion give the optimizer momentum=0"
            )

    def init(self, layout: Layout) -> State:
        return {
            "momentum": FlatBuffer(torch.zeros(layout.numel, dtype=torch.float32), layout),
            "q": PerParameter(
                {
                    param.name: torch.zeros(b, r, dtype=torch.float32)
                    for param, _, b, r in self._matrices(layout)
                }
            ),
        }

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        layout = context.layout
        B = state["momentum"].data + x
        matrices = list(self._matrices(layout))
        own = {param.name: piece for param, piece in layout.pieces(B)}
        # In memory of their own: a product's last bits depend on how its operands are aligned.
        each = {param.name: own[param.name].view(a, b).clone() for param, a, b, _ in matrices}
        plain = [param for param in layout.slices if param.name not in each]

        Q = {name: _enlivened(q, name, context) for name, q in state["q"].items()}
        gradients = {param.name: piece for param, piece in layout.pieces(x)}
        said = [*(gradients[p.name] for p in plain), *(each[name] @ Q[name] for name in each)]
        agreed = yield from _means(said, context)
        P = {name: _orthonormal(p) for name, p in zip(each, agreed[len(plain) :], strict=True)}
        R_own = {name: each[name].mT @ P[name] for name in each}
        R = dict(zip(each, (yield from _means(list(R_own.values()), context)), strict=True))

        estimate, momentum = torch.empty_like(x), B  # B is this step's own
        out = {param.name: piece for param, piece in layout.pieces(estimate)}
        for param, value in zip(plain, agreed, strict=False):
            out[param.name].copy_(value)
            own[param.name].zero_()  # no matrix, no momentum
        kept = {}
        for param, a, b, _ in matrices:
            name = param.name
            own[name].view(a, b).copy_(each[name].addmm_(P[name], R_own[name].mT, alpha=self.mu - 1))
            kept[name] = _unit_columns(R[name])
            out[name].view(a, b).copy_((a / b) ** 0.5 * (P[name] @ kept[name].mT))

        def contribution() -> Tensor:
            parts = estimate.clone()
            for param, piece in layout.pieces(parts):
                if param.name not in each:
                    piece.copy_(gradients[param.name])
            return parts

        new = {"momentum": FlatBuffer(momentum, layout), "q": PerParameter(kept)}
        return AggregateResult(estimate, contribution, new)

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        matrices = list(self._matrices(layout))
        plain = layout.numel - sum(a * b for _, a, b, _ in matrices)
        p, q = (sum(r * side for side, r in sides) for sides in _both(matrices))
        return all_reduce_bytes(4 * (plain + p), size) + all_reduce_bytes(4 * q, size)

    def _matrices(self, layout: Layout) -> Iterator[tuple[ParamSlice, int, int, int]]:
        """Each matrix with its rows, columns and rank."""
        for param in layout.slices:
            if not param.whole:
                raise DistcompError(
                    f"{param.name} arrives in pieces, and dion needs whole matrices; use qsgd, topk or "
                    "another method that works element by element"
                )
            if len(param.shape) >= 2 and param.numel > 0:
                a, b = param.shape[0], param.numel // param.shape[0]
                yield param, a, b, min(self.rank, a, b)


def _both(
    matrices: list[tuple[ParamSlice, int, int, int]],
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    return [(a, r) for _, a, _, r in matrices], [(b, r) for _, _, b, r in matrices]


def _means(tensors: list[Tensor], context: StepContext) -> Rounds[list[Tensor]]:
    """The means of all, by one all-reduce; in memory of their own, in their shapes."""
    if not any(tensor.numel() for tensor in tensors):
        return tensors
    total = yield from mean(torch.cat([tensor.reshape(-1) for tensor in tensors]), context)
    pieces = torch.split(total, [tensor.numel() for tensor in tensors])
    return [piece.clone().view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


def _orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns of the same span (``[a, r]``); of any finite magnitude."""
    basis: Tensor = torch.linalg.qr(_scaled(columns)).Q
    return basis


def _unit_columns(columns: Tensor) -> Tensor:
    """Each column over its length; zeros stay zeros."""
    scaled = _scaled(columns)
    lengths: Tensor = scaled.norm(dim=0, keepdim=True)
    return scaled / lengths.clamp(min=2.0**-60)


def _scaled(x: Tensor) -> Tensor:
    """With a largest magnitude of 1, whose square neither overflows nor vanishes."""
    largest = x.abs().max() if x.numel() else torch.zeros((), device=x.device, dtype=torch.float32)
    return torch.where(largest > 0, x / largest.clamp(min=torch.finfo(torch.float32).tiny), x)


def _enlivened(q: Tensor, name: str, context: StepContext) -> Tensor:
    """Q with noise, the same on all ranks, in columns that are zero: in the first step all are."""
    dead = ~q.any(dim=0, keepdim=True)
    if not dead.any():
        return q.clone()
    generator = context.shared.fold("dion", name).generator()
    noise = torch.randn(q.shape, generator=generator, dtype=torch.float32).to(q.device)
    return torch.where(dead, _unit_columns(noise), q)


@register(
    paper="Ahn, Xu, Abreu & Langford, Dion: distributed orthonormalized updates, 2025",
    wire="2 (n-1)/n 4r(a+b) per matrix of a rows and b columns, r = rank",
    summable=True,
    biased=True,
    direction=True,
    deviations="a rank keeps its own share of the factor in its momentum (the mean is the same); a column "
    "that is zero is drawn anew; QR without a randomized sketch; biases and norms take the optimizer's plain "
    "step in place of Lion's or Adam's",
    limitations="with momentum in the optimizer, which then counts twice; all matrices step by the same "
    "learning rate, biases by their gradients times it: give them groups of their own",
)
def dion(rank: int = 16, mu: float = 0.95) -> Method:
    """Send a momentum's matrices as two thin ones, and step along the orthonormal product.

    See :class:`distcomp.methods.Dion`. ``rank`` of the step, ``mu`` the momentum's factor. The optimizer is
    SGD with momentum 0, its learning rate as for Muon.
    """
    return except_small(Dion(rank, mu))
