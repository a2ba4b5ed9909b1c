"""After SplitNet's cut: the groups as sources of active parameters, each sent when it is its turn."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from distcomp.active import ActiveParameters, ActiveSet, Context
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.parametrize.chain import chains
from distcomp.pruning.masks import unwrapped
from distcomp.structured.split import BlockDiagonal


@dataclass(frozen=True)
class GroupsInTurn(ActiveParameters):
    """In step t the blocks of group ``t mod groups`` are exchanged, and all parameters that are of no group.

    ``blocks`` names the blocks of each group, as ``named_parameters()`` does. Gradients of the others are
    owed, and sent with those of their turn. A group's bytes are sent in one of ``groups`` steps; all of a
    group or nothing of it is exchanged, so that what one group computes is consistent. Use it with
    ``distcomp.averaging.active_only(method, groups_in_turn(model))``.
    """

    blocks: tuple[tuple[str, ...], ...]
    keeps_dense_grad = True

    def active(self, layout: Layout, context: Context) -> ActiveSet:
        turn = context.step % len(self.blocks)
        asleep = {name for group, names in enumerate(self.blocks) if group != turn for name in names}
        return ActiveSet.of(layout, {name: name not in asleep for name in layout.names})


def groups_in_turn(model: nn.Module) -> GroupsInTurn:
    """The source of a model that was cut. Raises DistcompError where nothing of it is cut into groups, or
    into different numbers of them."""
    module = unwrapped(model)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    cut = [described for _, _, described in chains(module) if isinstance(described.links[0], BlockDiagonal)]
    counts = {len(described.theta) for described in cut}
    if len(counts) != 1:
        raise DistcompError(
            f"the model has layers cut into {sorted(counts) or 'no'} groups; cut it first, into one "
            f"number of them: "
            "distcomp.structured.splitnet(model, layers, groups)"
        )
    (groups,) = counts
    return GroupsInTurn(
        tuple(tuple(names[id(described.theta[group])] for described in cut) for group in range(groups))
    )
