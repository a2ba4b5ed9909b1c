"""What a choice of layers says about the wire: a source of active parameters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from distcomp.active import ActiveParameters, ActiveSet, Context
from distcomp.conditional.choices import LayerChoice
from distcomp.layout import Layout


@dataclass(frozen=True)
class LayersSeen:
    """What a model did, up to and with iteration ``step``: each layer's last iteration awake (-1: none)."""

    step: int
    last_awake: Mapping[str, int]


def layers_seen(choice: LayerChoice, step: int, window: int = 1) -> LayersSeen:
    """What a model that follows ``choice`` has done by ``step``, as far as ``window`` iterations go back."""
    last_awake = dict.fromkeys(choice.layers, -1)
    for before in range(max(0, step - window + 1), step + 1):
        last_awake |= dict.fromkeys(choice.awake(before), before)
    return LayersSeen(step, last_awake)


@dataclass(frozen=True)
class AwakeLayers(ActiveParameters):
    """The parameters of layers that were awake in the last ``period`` iterations, and all of no layer.

    ``period=1`` for gradients. Where models are averaged every ``period`` iterations, a layer that slept
    through all of them is alike on all ranks and is not sent: it has a clock of its own.

    What the model did is observed (:class:`LayersSeen`), so ranks compare what happened, not what ought to
    have. Where nothing was observed (a step that is planned) the choice answers, which does as the model
    would.
    """

    choice: LayerChoice
    observes: str = field(default="", repr=False)
    period: int = 1

    def active(self, layout: Layout, context: Context) -> ActiveSet:
        seen = context.observed.get(self.observes) if self.observes else None
        if seen is None:
            seen = layers_seen(self.choice, context.step, self.period)
        assert isinstance(seen, LayersSeen)
        asleep = tuple(
            f"{layer}." for layer, last in seen.last_awake.items() if last <= seen.step - self.period
        )
        off = frozenset(name for name in layout.names if name.startswith(asleep))
        known: OrderedDict[frozenset[str], ActiveSet] = layout.remember("awake layers", OrderedDict)
        if off not in known:  # a bucket of one layer has two sets in all, and their plans are made once
            known[off] = ActiveSet.of(layout, dict.fromkeys(off, False))
        known.move_to_end(off)
        while len(known) > REMEMBERED:
            known.popitem(last=False)
        return known[off]


REMEMBERED = 64
"""Active sets of a layout that are kept for the next time."""
