"""How many bytes does each layer deserve? Compressors chosen layer by layer, to spend a budget where it
lowers the error most."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distcomp.collectives import AllGather, Rounds
from distcomp.compressors import Compressor, Identity, Quantize, TopK
from distcomp.compressors.topk import with_values
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods.base import NAMES, AggregateResult, Method, PerParameter, State, StepContext
from distcomp.methods.feedback import ErrorFeedback
from distcomp.methods.from_compressor import from_compressor
from distcomp.methods.registry import register
from distcomp.payload import Part, Payload, body_bytes, wire_bytes
from distcomp.schedule import Schedule, Varying, at, extremes, varying

LADDER: tuple[Compressor, ...] = (
    Identity(),
    *(Quantize(bits, rounding="nearest") for bits in (8, 4, 3, 2, 1)),
    *(with_values(TopK(ratio), "int8") for ratio in (1 / 16, 1 / 64, 1 / 256, 1 / 1024)),
)
"""From everything to next to nothing: 32, 8, 4, 3, 2, 1, about 0.9, 0.26, 0.07 and 0.02 bits per value.
Rounding to nearest errs less than at random; error feedback takes care of the bias."""


@dataclass(frozen=True)
class Allocate(Method):
    """Each layer by the compressor of a ladder that makes the total error least within a budget of bytes.

    ::

        every step               layer l through C_o(l)
        every period-th, too     E_lo = sum_i |x_il - C_o(x_il)|^2  for layer l and option o, all-gathered
                                 o(l) <- argmin sum_l E_l,o(l)   with   sum_l bytes_l,o(l) <= budget 4d

    The plan is found by dynamic programming from numbers that are the same on every rank to the last bit,
    and holds from the next step on; until the first, all layers go by the richest option that fits. The
    ladder holds "do not compress this": where the budget allows and it pays, a layer goes in float32. The
    budget holds in each flat buffer (bucket) by itself, in payload bytes; where the cheapest option exceeds
    it, all go by their cheapest, and a warning gives the numbers. Use it inside error feedback, which then
    also levels what the plan neglects.

    On the wire: the payloads of the options in use, each by its cheapest pattern; every ``period`` steps
    ``8 L O`` bytes of errors, gathered. ``payload_bytes`` is exact until the first plan, which it cannot
    foresee.

    Source: Markov et al., "L-GreCo: layerwise-adaptive gradient compression", MLSys 2024. We differ: it
    fixes the total error and minimizes bytes, here bytes are fixed and the error is least; options of any
    kind in one ladder; errors are of the gradient with its residual, over all ranks.

    Raises DistcompError for a budget outside of (0, 100], a period below 1, and an empty ladder.
    """

    budget: Varying = 1 / 32
    ladder: tuple[Compressor, ...] = LADDER
    period: Varying = 100.0

    needs = frozenset({NAMES})

    def __post_init__(self) -> None:
        low, high = extremes(self.budget)
        if not 0 < low <= high <= 100 or extremes(self.period)[0] < 1:
            raise DistcompError(
                f"budget={self.budget} is a part of float32's bytes, above 0 and at most 100, "
                f"and period={self.period} counts steps, 1 or more"
            )
        if not self.ladder:
            raise DistcompError("the ladder holds no compressor; leave it at its default")

    def init(self, layout: Layout) -> State:
        return {
            "option": PerParameter(
                {name: torch.tensor(UNPLANNED, dtype=torch.int64) for name in layout.names}
            )
        }

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        plan = self._plan(state["option"], context.layout, context.step)
        views = {param.name: piece for param, piece in context.layout.pieces(x)}
        results = []
        for option, compressor in enumerate(self.ladder):
            part = _chosen(
                context.layout, frozenset(name for name, chosen in plan.items() if chosen == option)
            )
            if part.slices:
                own = x if part is context.layout else torch.cat([views[name] for name in part.names])
                aggregation = from_compressor(compressor).aggregate(own, {}, replace(context, layout=part))
                results.append((part, (yield from aggregation)))
        if self._plans_in(context.step):
            plan = yield from self._planned(x, context)
        return AggregateResult(
            _together(context.layout, x, [(part, result.estimate) for part, result in results]),
            lambda: _together(context.layout, x, [(part, result.contribution()) for part, result in results]),
            {
                "option": PerParameter(
                    {name: torch.tensor(plan[name], dtype=torch.int64) for name in context.layout.names}
                )
            },
        )

    def _plans_in(self, step: int) -> bool:
        return (step + 1) % max(1, round(at(self.period, step))) == 0

    def _plan(self, kept: Mapping[str, Tensor], layout: Layout, step: int) -> dict[str, int]:
        """The option of each layer; what has not been planned yet goes by the richest that all could have."""
        plan = {name: int(kept[name]) for name in layout.names}
        if UNPLANNED in plan.values():
            fits = self._uniform(layout, step)
            plan = {name: fits if option == UNPLANNED else option for name, option in plan.items()}
        return plan

    def _uniform(self, layout: Layout, step: int) -> int:
        sizes = _sizes(layout, self.ladder).sum(0)
        fitting = np.flatnonzero(sizes <= self._budget_bytes(layout, step))
        return int(fitting[sizes[fitting].argmax()] if len(fitting) else sizes.argmin())

    def _budget_bytes(self, layout: Layout, step: int) -> int:
        return int(at(self.budget, step) * 4 * layout.numel)

    def _planned(self, x: Tensor, context: StepContext) -> Rounds[dict[str, int]]:
        """Every rank's errors with every option, and what follows for the steps to come."""
        layout = context.layout
        own = Payload.empty(self._table(layout), x.device)
        own["values"].view(len(layout.slices), len(self.ladder)).copy_(self._errors(x, context))
        payloads: list[Payload] = yield AllGather(own)
        # In rank order, on the CPU, in float64: ranks that planned from other bits would send other things.
        table = sum(
            (payload["values"].cpu().numpy() for payload in payloads[1:]),
            start=payloads[0]["values"].cpu().numpy(),
        )
        errors = np.nan_to_num(table).reshape(len(layout.slices), len(self.ladder))
        sizes, budget = _sizes(layout, self.ladder), self._budget_bytes(layout, context.step)
        least = int(sizes.min(1).sum())
        if least > budget:
            warnings.warn(
                f"the budget of {budget} bytes cannot be met in a bucket of {layout.numel} elements: the "
                f"cheapest options take {least}; raise it, or let buckets be larger",
                stacklevel=2,
            )
        return dict(zip(layout.names, knapsack(errors, sizes, budget), strict=True))

    def _errors(self, x: Tensor, context: StepContext) -> Tensor:
        """``[layers, options]``: squared errors of this rank (float64)."""
        columns = []
        for option, compressor in enumerate(self.ladder):
            payload = compressor.encode(x, context.layout, context.private.fold("measure", option))
            # By every option, also those that are not in use: that is what a plan compares.
            missed = x - compressor.decode(payload, context.layout)
            columns.append([piece.double().square().sum() for _, piece in context.layout.pieces(missed)])
        rows = list(zip(*columns, strict=True))
        return torch.stack([torch.stack(row) for row in rows]) if rows else x.new_zeros(0, len(columns))

    def _table(self, layout: Layout) -> tuple[Part]:
        return (Part("values", torch.float64, len(layout.slices) * len(self.ladder)),)

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        sent = (
            from_compressor(self.ladder[self._uniform(layout, step)]).payload_bytes(layout, size, step)
            if layout.slices
            else 0
        )
        if self._plans_in(step):
            sent += (size - 1) * wire_bytes(self._table(layout))
        return sent


UNPLANNED = -1
"""The option of a layer before the first plan."""


@lru_cache(maxsize=256)
def _chosen(layout: Layout, names: frozenset[str]) -> Layout:
    """The part of a flat buffer; the flat buffer's own layout where that is all of it."""
    return layout if len(names) == len(layout.names) else layout.select(lambda param: param.name in names)


def _together(layout: Layout, like: Tensor, parts: list[tuple[Layout, Tensor]]) -> Tensor:
    """The flat buffer of what went by different options."""
    if len(parts) == 1:
        return parts[0][1]
    views = {param.name: piece for part, buffer in parts for param, piece in part.pieces(buffer)}
    return torch.cat([views[name] for name in layout.names]) if views else torch.empty_like(like)


Table = NDArray[np.float64]
Sizes = NDArray[np.int64]


@lru_cache(maxsize=64)
def _sizes(layout: Layout, ladder: tuple[Compressor, ...]) -> Sizes:
    """``[layers, options]``: payload bytes, headers apart."""
    return np.array(
        [
            [body_bytes(compressor.parts(Layout((param,)))) for compressor in ladder]
            for param in layout.slices
        ],
        dtype=np.int64,
    ).reshape(len(layout.slices), len(ladder))


BINS = 8192
"""The budget is spent in so many coins; a size is rounded up to the next, so that it is never exceeded."""


def knapsack(errors: Table, sizes: Sizes, budget: int) -> list[int]:
    """One option per row with the least total error among those whose sizes add up to ``budget`` at most.

    Among equals the smaller. If nothing fits: the smallest option of each row.
    """
    # Sizes are rounded up and the purse down: what fits in coins fits in bytes.
    coin = max(1, -(-budget // BINS))
    coins, purse = -(-sizes // coin), budget // coin
    if not len(sizes) or coins.min(1).sum() > purse:
        return [int(row.argmin()) for row in sizes]
    least = np.zeros(purse + 1)  # the least error of the rows so far, by what may be spent on them
    taken = []
    for error, price in zip(errors, coins, strict=True):
        order = np.argsort(price, kind="stable")
        ways = np.full((len(order), purse + 1), np.inf)
        for way, option in zip(ways, order, strict=True):
            if price[option] <= purse:
                way[price[option] :] = least[: purse + 1 - price[option]] + error[option]
        taken.append(order[ways.argmin(0)])
        least = ways.min(0)
    plan, left = [], purse
    for options, price in zip(reversed(taken), coins[::-1], strict=True):
        plan.append(int(options[left]))
        left -= int(price[plan[-1]])
    return plan[::-1]


@register(
    paper="Markov et al., L-GreCo, MLSys 2024",
    wire="budget 4d in payload bytes, by the cheapest pattern of each option in use",
    summable=False,
    biased=True,
    deviations="fixes the bytes and minimizes the error; quantizers and sparsifiers in one ladder",
    limitations="where layers are much alike, one setting for all does as well; where gradients change "
    "suddenly, the plan is old until the next period",
)
def allocate(budget: float | str | Schedule = 1 / 32, period: float | str | Schedule = 100.0) -> Method:
    """Spend a budget of bytes on the layers where it lowers the error most, each by the compressor that
    suits it.

    See :class:`distcomp.methods.Allocate`. ``budget`` is the part of float32's bytes, a number or a
    schedule (``"0.125 *> 0.0078125 @ 1000"``); the plan is made anew every ``period`` steps, which may be a
    schedule, too. With error feedback. Other ladders: ``ErrorFeedback(Allocate(ladder=(...)))``.
    """
    return ErrorFeedback(Allocate(varying(budget), LADDER, varying(period)))
