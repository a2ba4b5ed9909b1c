"""Two networks, two methods: full precision inside a node, compressed between nodes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distcomp.collectives import Group, Request, Rounds, partitioned, partitioned_bytes, within
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods.base import AggregateResult, Method, State, StepContext
from distcomp.methods.basic import qsgd
from distcomp.methods.registry import method_of, register
from distcomp.methods.scheduled import EXACT
from distcomp.process_environment import LAUNCHERS
from distcomp.randomness import Key


@dataclass(frozen=True)
class NodePosition:
    """Where a rank is: in node ``index``, whose ranks are ``node``, and at ``rank`` among them; ``column``
    holds the ranks at this place of every node."""

    index: int
    rank: int
    node: Group
    column: Group


@dataclass(frozen=True)
class TwoLevel(Method):
    """First the mean of each node by ``inside``, then the mean of the nodes by ``across``.

    ::

        y_k = inside's mean of node k's ranks;      estimate = across's mean of y_1 ... y_K
        contribution_i = inside's + (across's - y_k)

    All ranks of a node hold the same ``y_k`` and hold across's exchange alike, each carrying its part
    of every request: the l-th of L ranks sums or gathers the l-th part with the l-th ranks of the other
    nodes, and the node puts the parts together. So a node sends each byte once, through all of its ranks at
    once, and every rank ends with the same residuals.

    On the wire per rank: ``inside``'s bytes within L ranks; an L-th of ``across``'s within K nodes; within
    the node ``(L-1)/L`` times what came from outside.

    ``nodes``: the ranks of each node, all as many. None: every rank is a node of its own, and ``across``
    does it all.

    Source: the two-level all-reduce of most collective libraries; of ranks that share the exchange between
    nodes, Cho et al., BlueConnect, 2019. We differ: between nodes any method may run, of however many
    rounds.

    Raises DistcompError for nodes of unequal size, or that are not all the ranks there are.
    """

    inside: Method
    across: Method
    nodes: tuple[Group, ...] | None = None

    def __post_init__(self) -> None:
        if self.nodes is None:
            return
        ranks = sorted(rank for node in self.nodes for rank in node)
        if len({len(node) for node in self.nodes}) != 1 or ranks != list(range(len(ranks))):
            raise DistcompError(
                f"nodes must name each rank once and be of equal size, not {self.nodes}; start as many "
                "processes on every node"
            )

    @property
    def propagates_nonfinite(self) -> bool:  # type: ignore[override]
        return self.inside.propagates_nonfinite and self.across.propagates_nonfinite

    def init(self, layout: Layout) -> State:
        return {"inside": self.inside.init(layout), "across": self.across.init(layout)}

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        position = self._position(context.rank, context.size)
        # Nodes draw apart; across, the ranks of a node draw alike: each carries a part of one exchange.
        inside, across = context.shared.fold("inside", position.index), context.shared.fold("across")
        near = replace(context, rank=position.rank, size=len(position.node), shared=inside)
        far = replace(context, rank=position.index, size=len(position.column), shared=across)
        if near.size == 1:
            result = yield from within(position.column, self.across.aggregate(x, state["across"], far))
            return replace(result, state={**state, "across": result.state})
        node = yield from within(position.node, self.inside.aggregate(x, state["inside"], near))
        if far.size == 1:
            return replace(node, state={**state, "inside": node.state})
        nodes = yield from _shared(position, self.across.aggregate(node.estimate, state["across"], far))
        return AggregateResult(
            nodes.estimate,
            lambda: node.contribution() + (nodes.contribution() - node.estimate),
            {"inside": node.state, "across": nodes.state},
        )

    def _position(self, rank: int, size: int) -> NodePosition:
        nodes = self.nodes or tuple((rank_,) for rank_ in range(size))
        if sum(map(len, nodes)) != size:
            raise DistcompError(
                f"nodes={nodes} are {sum(map(len, nodes))} ranks, and {size} are here; say where each rank is"
            )
        index = next(index for index, node in enumerate(nodes) if rank in node)
        local = nodes[index].index(rank)
        return NodePosition(index, local, nodes[index], tuple(node[local] for node in nodes))

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        """Of ``across`` by what it asks for when all is zero: what is sent depends on the layout alone."""
        position = self._position(0, size)
        near, far = len(position.node), len(position.column)
        if near == 1:
            return self.across.payload_bytes(layout, far, step)
        sent = self.inside.payload_bytes(layout, near, step)
        if far == 1:
            return sent
        context = StepContext(0, far, layout, step, Key.of(0))
        aggregation = self.across.aggregate(
            torch.zeros(layout.numel, dtype=torch.float32), self.across.assumed_state(layout, step), context
        )
        return sent + round(
            sum(partitioned_bytes(request, near, far) for request in _requests(aggregation, far))
        )


def _shared(position: NodePosition, aggregation: Rounds[AggregateResult]) -> Rounds[AggregateResult]:
    """The exchange of a node with the others, every request carried by all of its ranks in parts."""
    try:
        request = next(aggregation)
        while True:
            answer = yield from partitioned(
                request, position.index, position.column, position.rank, position.node
            )
            request = aggregation.send(answer)
    except StopIteration as stop:
        result: AggregateResult = stop.value
        return result


def _requests(aggregation: Rounds[AggregateResult], size: int) -> Iterator[Request]:
    """What an exchange asks for, with answers that are made up."""
    try:
        request = next(aggregation)
        while True:
            yield request
            request = aggregation.send(request.made_up(0, size))
    except StopIteration:
        return


def nodes_of(environment: Mapping[str, str]) -> tuple[Group, ...] | None:
    """The ranks of each node, from a launcher's environment variables; None where there are none.

    Ranks are taken to be numbered node by node, which is the default of these launchers.

    Raises DistcompError where nodes cannot be of equal size.
    """
    for launcher in LAUNCHERS:
        size_text, node_text = environment.get(launcher.size, ""), environment.get(launcher.local_size, "")
        node_text = re.sub(r"\(x\d+\)$", "", node_text)  # Slurm's "2(x3)": two on each of three
        if size_text.isdecimal() and node_text:
            size, node = int(size_text), int(node_text) if node_text.isdecimal() else 0
            if node < 1 or size % node:
                raise DistcompError(
                    f"{launcher.size}={size} processes are not nodes of {launcher.local_size}={node_text}; "
                    "start as many on every node"
                )
            return tuple(tuple(range(first, first + node)) for first in range(0, size, node))
    return None


ACROSS = qsgd()
"""Between nodes, unless another is given."""


@register(
    paper="two-level all-reduce; Cho et al., BlueConnect, 2019",
    wire="inside's within a node; 1/L of across's between nodes of L ranks, and within the node what came in",
    summable=False,
    biased=False,
    deviations="any method may run between nodes; all ranks of a node carry its requests in parts",
    limitations="where the network inside a node is no faster than that between nodes",
)
def two_level(
    inside: Method | str = EXACT, across: Method | str = ACROSS, nodes: tuple[Group, ...] | None = None
) -> Method:
    """Average in full precision inside a node, and compress between nodes.

    See :class:`distcomp.methods.TwoLevel`. ``inside`` and ``across`` are methods, or the text of one.
    ``nodes`` are the ranks of each node, ``((0, 1), (2, 3))``; without them, as the launcher's environment
    tells; and where that tells nothing, every rank is a node of its own.
    """
    known = nodes_of(os.environ) if nodes is None else tuple(tuple(node) for node in nodes)
    return TwoLevel(method_of(inside), method_of(across), known)
