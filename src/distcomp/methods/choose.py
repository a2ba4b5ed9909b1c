"""Different methods for different parameters: by role, size or name."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, replace

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
        return layout.select(self.rule), layout.select(lambda segment: not self.rule(segment))

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

        apart = [
            [piece for segment, piece in turn.layout.pieces(x) if self.rule(segment) is side]
            for side in (True, False)
        ]
        one = yield from self.special.talk(
            torch.cat(apart[0]), state["special"], replace(turn, layout=special)
        )
        two = yield from self.usual.talk(torch.cat(apart[1]), state["usual"], replace(turn, layout=usual))
        return Outcome(
            self._together(one.estimate, two.estimate, turn.layout),
            lambda: self._together(one.contribution(), two.contribution(), turn.layout),
            {"special": one.state, "usual": two.state},
        )

    def _together(self, special: Tensor, usual: Tensor, layout: Layout) -> Tensor:
        """The slab in its own order again."""
        at = {True: 0, False: 0}
        pieces = []
        for segment in layout.segments:
            side = self.rule(segment)
            source = special if side else usual
            pieces.append(source[at[side] : at[side] + segment.numel])
            at[side] += segment.numel
        return torch.cat(pieces)

    def payload_bytes(self, layout: Layout, size: int) -> int:
        special, usual = self._layouts(layout)
        if not special.segments:
            return self.usual.payload_bytes(usual, size)
        if not usual.segments:
            return self.special.payload_bytes(special, size)
        return self.special.payload_bytes(special, size) + self.usual.payload_bytes(usual, size)
