"""Different methods for different parameters: by role, size or name."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, replace

from torch import Tensor

from distcomp.collectives import Rounds
from distcomp.compressors.base import Compressor
from distcomp.kernels.pieces import Moves, move
from distcomp.layout import Layout, ParamSlice
from distcomp.methods.base import NAMES, SHAPES, AggregateResult, Method, State, StepContext


@dataclass(frozen=True)
class Rule:
    """Which parameters: any of these roles, fewer elements than this, or names that match one of these
    patterns."""

    roles: tuple[str, ...] = ()
    below_numel: int = 0
    names: tuple[str, ...] = ()

    @property
    def needs(self) -> frozenset[str]:
        """What the rule must know of a parameter, as :attr:`distcomp.methods.Method.needs` says it."""
        return frozenset({NAMES} if self.names else ()) | frozenset({SHAPES} if self.below_numel else ())

    def __call__(self, param: ParamSlice) -> bool:
        if param.role in self.roles:
            return True
        total = 1
        for side in param.shape:
            total *= side
        return total < self.below_numel or any(fnmatch.fnmatch(param.name, n) for n in self.names)


@dataclass(frozen=True)
class Partition(Method):
    """Parameters that ``rule`` accepts go through ``special``, the others through ``usual``, in this order.

    The parameters of each are laid end to end, so that each method runs one exchange however many parameters
    there are. Estimate and contribution are those of both, put where their parameters lie: the law holds for
    the whole because it does for each. On the wire: the bytes of both.
    """

    rule: Rule
    special: Method
    usual: Method

    @property
    def propagates_nonfinite(self) -> bool:  # type: ignore[override]
        return self.special.propagates_nonfinite and self.usual.propagates_nonfinite

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.rule.needs

    def _layouts(self, layout: Layout) -> tuple[Layout, Layout]:
        return sides(self.rule, layout).layouts

    def init(self, layout: Layout) -> State:
        special, usual = self._layouts(layout)
        return {"special": self.special.init(special), "usual": self.usual.init(usual)}

    def assumed_state(self, layout: Layout, step: int) -> State:
        special, usual = self._layouts(layout)
        return {
            "special": self.special.assumed_state(special, step),
            "usual": self.usual.assumed_state(usual, step),
        }

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        special, usual = self._layouts(context.layout)
        if not special.slices:
            result = yield from self.usual.aggregate(x, state["usual"], context)
            return replace(result, state={**state, "usual": result.state})
        if not usual.slices:
            result = yield from self.special.aggregate(x, state["special"], context)
            return replace(result, state={**state, "special": result.state})

        # One after the other, not interleaved: requests must come in one order on all ranks.
        x_special, x_usual = split(x, self.rule, context.layout)
        of_special = yield from self.special.aggregate(
            x_special, state["special"], replace(context, layout=special)
        )
        of_usual = yield from self.usual.aggregate(x_usual, state["usual"], replace(context, layout=usual))
        return AggregateResult(
            merge(of_special.estimate, of_usual.estimate, self.rule, context.layout),
            lambda: merge(of_special.contribution(), of_usual.contribution(), self.rule, context.layout),
            {"special": of_special.state, "usual": of_usual.state},
        )

    def sole_compressor(self) -> Compressor | None:
        return self.usual.sole_compressor()

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        special, usual = self._layouts(layout)
        if not special.slices:
            return self.usual.payload_bytes(usual, size, step)
        if not usual.slices:
            return self.special.payload_bytes(special, size, step)
        return self.special.payload_bytes(special, size, step) + self.usual.payload_bytes(usual, size, step)


@dataclass(frozen=True, eq=False)
class Sides:
    """Both layouts, and from where in the flat buffer to where in theirs each parameter moves."""

    special: Layout
    usual: Layout
    to_special: Moves
    to_usual: Moves

    @property
    def layouts(self) -> tuple[Layout, Layout]:
        """Of what the rule accepts, and of the others."""
        return self.special, self.usual


def sides(rule: Rule, layout: Layout) -> Sides:
    """The parameters that the rule accepts, and the others."""
    return layout.remember(("sides", rule), lambda: _sides_of(rule, layout))


def _sides_of(rule: Rule, layout: Layout) -> Sides:
    slices: tuple[list[ParamSlice], list[ParamSlice]] = [], []
    moves: tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]] = [], []
    ends = [0, 0]
    for param, at in zip(layout.slices, layout.offsets, strict=True):
        side = int(not rule(param))
        slices[side].append(param)
        moves[side].append((at, ends[side], param.numel))
        ends[side] += param.numel
    special, usual = (Layout(tuple(side)) for side in slices)
    return Sides(special, usual, Moves(tuple(moves[0])), Moves(tuple(moves[1])))


def split(x: Tensor, rule: Rule, layout: Layout) -> tuple[Tensor, Tensor]:
    """The flat buffer of what the rule accepts, and that of the others."""
    both = sides(rule, layout)
    special, usual = x.new_empty(both.special.numel), x.new_empty(both.usual.numel)
    move(x, special, both.to_special)
    move(x, usual, both.to_usual)
    return special, usual


def merge(special: Tensor, usual: Tensor, rule: Rule, layout: Layout) -> Tensor:
    """Both flat buffers as one again, in the order of ``layout``."""
    both = sides(rule, layout)
    out = special.new_empty(layout.numel)
    move(special.contiguous(), out, both.to_special.back)
    move(usual.contiguous(), out, both.to_usual.back)
    return out
