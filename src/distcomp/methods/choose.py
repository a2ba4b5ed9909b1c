"""Different methods for different parameters: by role, size or name."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from distcomp.exchange import Talk
from distcomp.layout import Layout, Segment
from distcomp.methods.base import Method, Outcome, State, Turn


@dataclass(frozen=True)
class Rule:
    """Which parameters: any of these roles, fewer elements than this, or names that match one of these
    patterns."""

    roles: tuple[str, ...] = ()
    below_numel: int = 0
    names: tuple[str, ...] = ()

    def __call__(self, segment: Segment) -> bool:
        if segment.role in self.roles:
            return True
        total = 1
        for side in segment.shape:
            total *= side
        return total < self.below_numel or any(fnmatch.fnmatch(segment.name, n) for n in self.names)


@dataclass(frozen=True)
class Choose(Method):
    """Parameters that ``rule`` accepts go through ``special``, the others through ``usual``, one after the
    other.

    The parameters of each are laid end to end, so that each method talks once however many parameters there
    are.
    """

    rule: Rule
    special: Method
    usual: Method

    @property
    def transparent(self) -> bool:  # type: ignore[override]
        return self.special.transparent and self.usual.transparent

    def _layouts(self, layout: Layout) -> tuple[Layout, Layout]:
        _, special, usual = parted(self.rule, layout)
        return special, usual

    def init(self, layout: Layout) -> State:
        special, usual = self._layouts(layout)
        return {"special": self.special.init(special), "usual": self.usual.init(usual)}

    def talk(self, x: Tensor, state: State, turn: Turn) -> Talk[Outcome]:
        special, usual = self._layouts(turn.layout)
        if not special.segments:
            outcome = yield from self.usual.talk(x, state["usual"], turn)
            return replace(outcome, state={**state, "usual": outcome.state})
        if not usual.segments:
            outcome = yield from self.special.talk(x, state["special"], turn)
            return replace(outcome, state={**state, "special": outcome.state})

        x_special, x_usual = apart(x, self.rule, turn.layout)
        one = yield from self.special.talk(x_special, state["special"], replace(turn, layout=special))
        two = yield from self.usual.talk(x_usual, state["usual"], replace(turn, layout=usual))
        return Outcome(
            joined(one.estimate, two.estimate, self.rule, turn.layout),
            lambda: joined(one.contribution(), two.contribution(), self.rule, turn.layout),
            {"special": one.state, "usual": two.state},
        )

    def payload_bytes(self, layout: Layout, size: int) -> int:
        special, usual = self._layouts(layout)
        if not special.segments:
            return self.usual.payload_bytes(usual, size)
        if not usual.segments:
            return self.special.payload_bytes(special, size)
        return self.special.payload_bytes(special, size) + self.usual.payload_bytes(usual, size)


@lru_cache(maxsize=256)
def parted(rule: Rule, layout: Layout) -> tuple[tuple[bool, ...], Layout, Layout]:
    """Which segments the rule accepts; the layout of these, and that of the others."""
    accepted = tuple(rule(segment) for segment in layout.segments)
    special, usual = (
        Layout(tuple(s for s, yes in zip(layout.segments, accepted, strict=True) if yes is side))
        for side in (True, False)
    )
    return accepted, special, usual


def apart(x: Tensor, rule: Rule, layout: Layout) -> tuple[Tensor, Tensor]:
    """The slab of what the rule accepts, and that of the others."""
    accepted, _, _ = parted(rule, layout)
    sides: tuple[list[Tensor], list[Tensor]] = [], []
    for is_special, (_, piece) in zip(accepted, layout.pieces(x), strict=True):
        sides[not is_special].append(piece)
    special, usual = (torch.cat(side) if side else x[:0] for side in sides)
    return special, usual


def joined(special: Tensor, usual: Tensor, rule: Rule, layout: Layout) -> Tensor:
    """Both slabs as one again, in the order of ``layout``."""
    accepted, *layouts = parted(rule, layout)
    pieces = [part.pieces(slab) for part, slab in zip(layouts, (special, usual), strict=True)]
    return torch.cat([next(pieces[not is_special])[1] for is_special in accepted])
