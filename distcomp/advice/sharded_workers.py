"""Workers that hold one model together, in one process: gathers of weights, gradients to their owners."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distcomp.attaching.fsdp_rows import parameter_buffer
from distcomp.averaging.base import Averaging, MultiLevel
from distcomp.compressors import Identity
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods.base import AggregateResult, Method, StepContext
from distcomp.methods.reduce_scatter import owned_layout, to_shards
from distcomp.methods.row_owners import needs_parameters, owners_of, to_row_owners
from distcomp.methods.weight_gather import Gather, TypedGather, WeightGather
from distcomp.randomness import Key
from distcomp.runtime.aggregation import Aggregation, Aggregator
from distcomp.runtime.driver import in_lock_step
from distcomp.runtime.lockstep import Lockstep


class ShardedWorkers:
    """``size`` workers that each keep some rows of every parameter of ``layout``, as FSDP2 has it, with one
    flat buffer for the whole model.

    ``weights`` None: the weights themselves are gathered, in float32. Before the forward and before the
    backward, where what was gathered is not kept.

    Raises DistcompError for a method that averages models: there is one.
    """

    def __init__(
        self,
        method: Method | Averaging | MultiLevel,
        weights: WeightGather | None,
        layout: Layout,
        size: int,
        seed: int,
    ) -> None:
        if not isinstance(method, Method):
            raise DistcompError(
                "a method that averages models needs several, and sharded workers hold one; leave --sharded "
                "out, or name a method of gradients"
            )
        self.net = Lockstep(size)
        self._size, self._seed, self._layout = size, seed, layout
        self._how = weights if weights is not None else Gather(Identity())
        self._cut = parameter_buffer(list(layout.slices), size)
        self._shard = self._cut.shard
        self._by_parameter = needs_parameters(method)
        self._talks = to_row_owners(method) if self._by_parameter else to_shards(method)
        pieces = self._cut.numel // size
        self._reduced = layout if self._by_parameter else owned_layout("gradients", size * pieces, size)
        self._gathered: list[Any] = [{}] * size
        self._states: list[Any] = [self._talks.init(self._reduced)] * size

    @torch.no_grad()
    def gather(self, x: Tensor, step: int) -> Tensor:
        """What every worker computes with, forward and backward, where ``x`` are the weights that are trained
        (both float32, ``[layout.numel]``)."""
        how = TypedGather(self._how, torch.float32)
        pieces = [self._cut.piece(x, worker) for worker in range(self._size)]
        first = self._exchange(how, pieces, self._gathered, self._shard, step)
        self._gathered = [result.state for result in first]
        if self._how.again(self._gathered[0], self._shard, self._size, torch.float32) is None:
            self._exchange(how, pieces, self._gathered, self._shard, step)
        return self._cut.parameters(first[0].estimate)

    @torch.no_grad()
    def reduce(self, grads: Tensor, step: int) -> Tensor:
        """The owners' estimates of the mean gradient, laid together (``[layout.numel]``).

        Raises DistcompError where a gradient is not finite.
        """
        buffers = list(grads.unbind())
        if not self._by_parameter:
            buffers = [torch.cat([self._cut.piece(x, owner) for owner in range(self._size)]) for x in buffers]
        results = self._exchange(self._talks, buffers, self._states, self._reduced, step)
        self._states = [result.state for result in results]
        if not self._by_parameter:
            return self._cut.parameters(torch.cat([result.estimate for result in results]))
        whole = torch.empty_like(grads[0])
        for rows, result in zip(owners_of(self._layout, self._size), results, strict=True):
            rows.put(rows.of(result.estimate), whole)
        return whole

    def _exchange(
        self, what: Aggregator, buffers: Sequence[Tensor], states: Sequence[Any], layout: Layout, step: int
    ) -> list[AggregateResult]:
        key = Key.of(self._seed, step)
        asked = [
            Aggregation(what, x, state, StepContext(worker, self._size, layout, step, key))
            for worker, (x, state) in enumerate(zip(buffers, states, strict=True))
        ]
        results = in_lock_step(self.net, asked)
        if not all(one.finite for one in asked):
            raise DistcompError(
                f"a weight or a gradient held a NaN or an infinity in step {step}: training diverged; lower "
                "the learning rate"
            )
        return results
