"""SGP: gossip along directed edges, where push-sum makes up for those who hear more than others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distcomp.averaging.base import Averaging, AveragingContext, agreed
from distcomp.averaging.digraph import Digraph, check_digraph, resolve_digraph
from distcomp.collectives import Push, Rounds
from distcomp.errors import DistcompError
from distcomp.layout import FlatBuffer, Layout
from distcomp.methods import register
from distcomp.methods.base import AggregateResult, PerParameter, State
from distcomp.payload import Part, Payload
from distcomp.schedule import Schedule, varying


@dataclass(frozen=True)
class SGP(Averaging):
    """Send shares of the model and of a weight, which begins at 1; their quotient is the model to train.

    ::

        x_i = x_i - step_i                                  the local update, made at z_i
        x_i = sum_j P_ij x_j;    w_i = sum_j P_ij w_j       P_ij: the share that j gives to i
        z_i = x_i / w_i                                     what the worker holds and trains

    The columns of P sum to 1, so no share is lost: the sum of all ``x`` moves by the local updates alone,
    whatever the graph. Its rows need not, so who hears much holds a large ``x``, and a ``w`` as large:
    ``z_i`` goes to the mean. Where all hear alike, ``w`` stays 1. ``x``: float32 ``[layout.numel]``.

    Source: Assran et al., "Stochastic gradient push", ICML 2019, algorithm 1. We differ: a period; any
    optimizer makes the step. Bytes: out-degree x 4 (d + 1), and a receipt of 32 bytes to each who sends here
    and is sent nothing. Memory: one model.

    Raises DistcompError for an unknown graph, and for ``on_failure="continue"``.
    """

    graph: str | Digraph = "directed_exponential"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.graph, str):
            check_digraph(self.graph)
        if self.on_failure != "stop":
            raise DistcompError(
                "what a dead worker held of the sum is lost, and sgp stops; on_failure='continue' is for "
                "dpsgd, choco and their like"
            )

    @property
    def starts_anew(self) -> bool:
        return True

    def init(self, x: Tensor, context: AveragingContext) -> State:
        return {
            "biased": FlatBuffer(x.clone(), context.layout),
            "weight": _weight(torch.ones(1, dtype=torch.float32), context),
        }

    def aggregate(self, x: Tensor, state: State, context: AveragingContext) -> Rounds[AggregateResult]:
        graph = resolve_digraph(self.graph, context.size)
        targets = graph.targets(context.rank, context.step)
        biased, (weight,) = state["biased"].data, state["weight"].values()
        # The step was made at z = x / w; the paper takes it from x itself.
        kept = torch.cat([biased + (x - biased / weight), weight]) / (1 + len(targets))
        payload = Payload.empty((Part("values", torch.float32, kept.numel()),), x.device)
        payload["values"].copy_(kept)
        received: list[Payload] = yield Push(payload, targets, graph.sources(context.rank, context.step))
        for share in received:
            kept += share["values"]
        biased, weight = kept[:-1].clone(), kept[-1:].clone()
        return agreed(
            biased / weight,
            {"biased": FlatBuffer(biased, context.layout), "weight": _weight(weight, context)},
        )

    def conditions(self, layout: Layout, size: int) -> dict[str, Any]:
        graph = resolve_digraph(self.graph, size)
        sent = [len(targets) for targets in graph.rounds[0]]
        return {"graph": graph.name, "out_degree": sum(sent) / size}

    def report(self, state: State) -> dict[str, Any]:
        """The push-sum weight: how much more than others this worker hears."""
        return {"push_sum_weight": float(next(iter(state["weight"].values())))}


def _weight(weight: Tensor, context: AveragingContext) -> PerParameter:
    return PerParameter({context.layout.names[0]: weight.float()})


@register(
    paper="Assran et al., Stochastic gradient push for distributed deep learning, ICML 2019",
    wire="out-degree 4d / period",
    summable=False,
    biased=False,
    kind="gossip",
    deviations="a period; any optimizer makes the local step; a rank that is sent something and sends "
    "nothing back answers with a header",
    limitations="a graph in which some hear little trains slowly: their weight is small and their model "
    "noisy; a worker that dies takes its share of the sum along",
)
def sgp(
    graph: str | Digraph = "directed_exponential",
    period: int | Schedule | str = 1,
) -> Averaging:
    """Send shares of the model along directed edges; divide by a weight that is sent along (push-sum).

    ``graph``: ``directed_exponential`` (the paper's: one target at a time, 1, 2, 4, ... places ahead),
    ``directed_exponential_all``, ``directed_ring``, or a ``distcomp.averaging.digraph.Digraph``. ``period``:
    steps between exchanges.
    """
    return SGP(graph=graph, period=varying(period))
