"""FSDP2: weights that are not trained, gathered once in few bits and kept packed on every rank.

Under adapters (LoRA) the base is most of a model and never changes; FSDP gathers it in every step all the
same, twice. Kept are the payloads of all ranks, b/8 bytes for every frozen parameter of the whole model, and
a copy of this rank's own shard, by which a change of it is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.compressors.base import Compressor
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods.base import State
from distcomp.methods.weight_gather import Gather, TypedGather
from distcomp.runtime.driver import Exchange


@dataclass(frozen=True)
class FrozenShards:
    """What is kept of the frozen weights of one flat buffer."""

    layout: Layout
    own: Tensor
    """This rank's shard, as it was gathered."""
    state: State


class FrozenWeights:
    """The frozen weights of a model's flat buffers."""

    def __init__(self, compressor: Compressor, size: int) -> None:
        self._how = Gather(compressor, reuse=True)
        self._size = size
        self._held: dict[str, FrozenShards] = {}

    def gather(
        self,
        name: str,
        own: Tensor,
        layout: Layout,
        exchange: Callable[[TypedGather, Tensor, Layout], Exchange],
    ) -> Tensor:
        """All ranks' shards (``own`` is this one's, in the type that is computed with) of the frozen weights
        in a flat buffer, in rank order (float32, equal on every rank). ``exchange`` gathers them the first
        time, and again where others are frozen.

        Raises DistcompError where they have changed since.
        """
        held = self._held.get(name)
        if held is None or held.layout != layout:
            done = exchange(TypedGather(self._how, own.dtype), own.to(torch.float32, copy=True), layout)
            result = done.result()
            if not done.finite:
                return result.estimate
            held = self._held[name] = FrozenShards(layout, own.clone(), result.state)
        elif not torch.equal(held.own, own):
            raise DistcompError(
                f"frozen weights of {name} ({layout.names[0]}, ...) changed since they were gathered, and "
                "keep_frozen computes with what was gathered; detach and attach again after loading weights, "
                "or leave keep_frozen out"
            )
        whole = self._how.again(held.state, layout, self._size, own.dtype)
        assert whole is not None
        return whole

    @property
    def state_bytes(self) -> int:
        """Bytes kept."""
        return sum(
            held.own.nbytes + self._how.state_bytes(held.layout, self._size, held.own.dtype)
            for held in self._held.values()
        )


def selected(flat: Tensor, layout: Layout, chosen: Layout) -> Tensor:
    """What a flat buffer of ``layout`` holds of ``chosen``'s parameters, one behind the other."""
    pieces = {param.name: piece for param, piece in layout.pieces(flat)}
    return torch.cat([pieces[name] for name in chosen.names])


def interleaved(parts: Sequence[tuple[Layout, Tensor]], layout: Layout, size: int) -> Tensor:
    """All ranks' shards of ``layout``, of all ranks' shards of its parts."""
    whole = torch.empty(size, layout.numel, dtype=torch.float32, device=parts[0][1].device)
    where = {
        param.name: whole[:, at : at + param.numel]
        for param, at in zip(layout.slices, layout.offsets, strict=True)
    }
    for part, values in parts:
        rows = values.view(size, part.numel)
        for param, at in zip(part.slices, part.offsets, strict=True):
            where[param.name].copy_(rows[:, at : at + param.numel])
    return whole.view(-1)
