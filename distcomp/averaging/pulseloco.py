"""PULSELoCo: of the outer gradient only what a bfloat16 weight would see is sent; the rest is owed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distcomp.averaging.base import Averaging, AveragingContext, agreed
from distcomp.averaging.outer import Outer
from distcomp.collectives import AllGather, Rounds
from distcomp.compressors.sparse import IndexCode
from distcomp.errors import DistcompError
from distcomp.layout import FlatBuffer, Layout
from distcomp.methods import register
from distcomp.methods.base import AggregateResult, PerParameter, State
from distcomp.payload import Part, Parts, Payload, wire_bytes
from distcomp.schedule import Schedule, varying

COUNT = (Part("sizes", torch.int64, 1),)
"""What is said first: how many values will follow."""


@dataclass(frozen=True)
class PulseLoCo(Averaging):
    """DiLoCo that sends those entries of the outer gradient that change the weight in bfloat16.

    ::

        v_i    = e_i + (anchor - x_i)
        seen   = bf16(anchor - v_i) != bf16(anchor)          what the next forward would compute with
        s_i    = v_i where seen, 0 elsewhere;    e_i = v_i - s_i
        anchor = outer(anchor, mean_i s_i);      x_i = anchor

    A bfloat16 has 8 significant bits: a step below 0.2 to 0.4 % of a weight is invisible, and at the rates of
    fine-tuning most are. What is invisible is owed, and is sent once enough has come together. Weights and
    outer gradients are float32 throughout.

    On the wire, every ``period`` steps: 40 bytes to each rank for the counts, then ``n-1`` payloads of ``k``
    values in float32 and their places, about ``2 + log2(d/k)`` bits each or a bitmap
    (:func:`sparse_bytes`). Memory: an anchor, a residual, an outer momentum, float32 ``[layout.numel]`` each.

    Source: Miahi & Belilovsky, "Understanding and exploiting weight update sparsity for communication-
    efficient distributed RL", 2026, version 2. We differ: places are coded without an entropy coder; what is
    seen is decided for the outer gradient itself, whatever the outer rate.

    Raises DistcompError for ``on_failure="continue"``, and for buffers that are neither kept nor averaged.
    """

    outer: Outer = field(default_factory=Outer)
    buffers: str = "average"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on_failure != "stop" or self.buffers not in ("keep", "average"):
            raise DistcompError(
                "pulseloco asks all workers and stops when one dies, and buffers are 'keep' or 'average', "
                f"not {self.on_failure!r} and {self.buffers!r}"
            )

    def init(self, x: Tensor, context: AveragingContext) -> State:
        return {
            "anchor": FlatBuffer(x.clone(), context.layout),
            "residual": FlatBuffer(torch.zeros_like(x), context.layout),
            "outer": self.outer.init(context.layout),
            "sent": _count(0, context),
        }

    def aggregate(self, x: Tensor, state: State, context: AveragingContext) -> Rounds[AggregateResult]:
        anchor = state["anchor"].data
        owed = state["residual"].data + (anchor - x)
        places = ((anchor - owed).bfloat16() != anchor.bfloat16()).nonzero().view(-1)
        payloads = yield from gathered(owed[places], places, x.numel())

        total = torch.zeros_like(x)
        for values, where in payloads:  # in rank order: the same bits everywhere
            total[where] += values
        residual = owed.clone()
        residual[places] = 0.0
        anchor, outer = self.outer.step(anchor, total / context.size, state["outer"])
        sent = int(next(iter(state["sent"].values()))) + places.numel()
        kept = {
            "anchor": FlatBuffer(anchor, context.layout),
            "residual": FlatBuffer(residual, context.layout),
            "outer": outer,
            "sent": _count(sent, context),
        }
        return agreed(anchor, kept)

    def conditions(self, layout: Layout, size: int) -> dict[str, Any]:
        """At most: where nearly everything is seen, and a bitmap says what is not."""
        values, bitmap = (
            sparse_parts(layout.numel, layout.numel)[0],
            sparse_parts(layout.numel // 2, layout.numel)[1],
        )
        most = (size - 1) * (wire_bytes(COUNT) + wire_bytes((values, bitmap)))
        return {"bytes_per_exchange_at_most": most}

    def report(self, state: State) -> dict[str, Any]:
        """How many values this worker has sent so far."""
        return {"values_sent": int(next(iter(state["sent"].values())))}


def gathered(values: Tensor, places: Tensor, numel: int) -> Rounds[list[tuple[Tensor, Tensor]]]:
    """Every rank's values and their places (rising, below ``numel``), each as many as it likes."""
    count = Payload.empty(COUNT, values.device)
    count["sizes"].fill_(places.numel())
    counts: list[Payload] = yield AllGather(count)
    parts = [sparse_parts(_checked(int(one["sizes"]), numel), numel) for one in counts]
    payload = Payload.empty(sparse_parts(places.numel(), numel), values.device)
    payload["values"].copy_(values)
    payload["indices"].copy_(IndexCode(numel, places.numel()).encode(places[None]).view(-1))
    payloads: Sequence[Payload] = yield AllGather(payload, parts=tuple(parts))
    return [
        (one["values"], IndexCode(numel, one["values"].numel()).decode(one["indices"][None]).view(-1))
        for one in payloads
    ]


def sparse_parts(count: int, numel: int) -> Parts:
    """Of ``count`` values of ``numel``, and their places."""
    return (
        Part("values", torch.float32, count),
        Part("indices", torch.uint8, IndexCode(numel, count).nbytes),
    )


def sparse_bytes(count: int, numel: int) -> int:
    """Bytes of a payload of ``count`` values of ``numel``, header included."""
    return wire_bytes(sparse_parts(count, numel))


def _checked(count: int, numel: int) -> int:
    if not 0 <= count <= numel:
        raise DistcompError(
            f"a rank announces {count} values of a model of {numel}; every rank must run the same version"
        )
    return count


def _count(count: int, context: AveragingContext) -> PerParameter:
    return PerParameter({context.layout.names[0]: torch.tensor([count], dtype=torch.int64)})


@register(
    paper="Miahi & Belilovsky, Understanding and exploiting weight update sparsity for "
    "communication-efficient distributed RL, 2026",
    wire="(n-1) k (4 + (2 + log2(d/k))/8) / period, k the values that a bfloat16 weight sees",
    summable=False,
    biased=True,
    kind="periodic",
    deviations="places are coded without an entropy coder; what is seen is decided for the outer gradient "
    "itself, whatever the outer rate",
    limitations="at the learning rates of pre-training, where most of what is learnt in a period is seen: it "
    "then sends more than diloco",
)
def pulseloco(
    period: int | Schedule | str = 8,
    outer_lr: float = 0.7,
    outer_momentum: float = 0.9,
    nesterov: bool = True,
    buffers: str = "average",
) -> Averaging:
    """DiLoCo that sends, every ``period`` steps, only what would change a weight in bfloat16.

    What would not is owed. ``outer_lr``, ``outer_momentum`` and ``nesterov`` are the outer optimizer's.
    ``buffers``: ``average`` or ``keep`` them at an exchange.
    """
    return PulseLoCo(outer=Outer(outer_lr, outer_momentum, nesterov), buffers=buffers, period=varying(period))
