"""What of a pruned model has a gradient: its masks, as immutable values that a method can be handed.

A pruner's masks are buffers in the model, which change as it trains. A :class:`MaskSnapshot` is what they
were at one tick of the clock; the training loop hands the newest to each exchange, in the context of the
step. So a method holds no pruner, and a copied or resumed method answers alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from distcomp.active import ActiveParameters, ActiveSet, Context
from distcomp.layout import Layout
from distcomp.pruning.masks import digest


@dataclass(frozen=True, eq=False)
class MaskSnapshot:
    """Masks as they were after one iteration, never written to again."""

    masks: Mapping[str, Tensor]
    """By the name that ``named_parameters()`` gives: bool, of the parameter's shape, on the CPU."""
    dense: frozenset[str] = frozenset()
    """Names of parameters whose inactive coordinates are exchanged, too, in the step that comes."""
    _sets: dict[tuple[Layout, bool], ActiveSet] = field(default_factory=dict, init=False, repr=False)

    def __repr__(self) -> str:
        short = hashlib.blake2b(digest(self.masks).to_bytes(8, "little"), digest_size=4).hexdigest()
        return f"MaskSnapshot({len(self.masks)} parameters, digest {short})"

    def active(self, layout: Layout, dense: bool = True) -> ActiveSet:
        """The active set; without ``dense`` those that are exchanged whole for once count as masked."""
        known = (layout, dense)
        if known not in self._sets:
            whole = self.dense if dense else frozenset()
            masks = {name: mask for name, mask in self.masks.items() if name not in whole}
            self._sets[known] = ActiveSet.of(layout, masks)
        return self._sets[known]


@dataclass(frozen=True)
class ActiveMasks(ActiveParameters):
    """The coordinates that a pruner's masks keep.

    Observed under ``pruner``: the newest :class:`MaskSnapshot`. Where none was handed over (a step that is
    planned, a model that does not train) it is ``initial``, the masks as they were when this source was made.
    """

    pruner: str = field(repr=False)
    """The pruner's name in this process (``Pruner.name``)."""
    initial: MaskSnapshot = field(metadata={"fingerprint": False})
    keeps_dense_grad: bool = False
    dense: bool = True
    """Whether gradients of inactive coordinates are exchanged where the criterion asks for them. Averaging
    of whole models does not."""

    def active(self, layout: Layout, context: Context) -> ActiveSet:
        newest = context.observed.get(self.pruner, self.initial)
        assert isinstance(newest, MaskSnapshot)
        return newest.active(layout, self.dense)
