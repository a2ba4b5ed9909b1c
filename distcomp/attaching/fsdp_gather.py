"""FSDP2: gathers of weights in few bits, in the place of each module's all-gather.

FSDP copies the shards of a module's parameters into one flat buffer, in the type that is computed with, and
gathers it: before the forward, and once more before the backward where the module reshards in between. What
is exchanged instead is said by :mod:`distcomp.methods.weight_gather`. Sharded parameters are only read.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distcomp.attaching.frozen import FrozenWeights, interleaved, selected
from distcomp.attaching.fsdp_reduction import Among
from distcomp.attaching.slices import slices_of
from distcomp.attaching.target import Target
from distcomp.compressors.base import Compressor
from distcomp.errors import DistcompError
from distcomp.layout import Layout, ParamSlice
from distcomp.methods.base import Method, State
from distcomp.methods.weight_gather import TypedGather, WeightGather, parse_weight_gather
from distcomp.private_torch import NO_BACKWARD, FSDPGroup, backward_number
from distcomp.runtime.driver import Exchange
from distcomp.runtime.executor import Executor

if TYPE_CHECKING:  # takes seconds to import, and who is attached to has imported it
    from torch.distributed.fsdp import FSDPModule

PREFIX = "weights/"
"""Begins the names under which a checkpoint keeps what all ranks hold, beside those of parameters."""


class Gatherer(Protocol):
    """Who serves a module's gathers while a method is attached."""

    def gather(self, name: str, shard: Tensor) -> Tensor:
        """All shards of a flat buffer, in rank order (float32)."""


class GatherUnit:
    """The gathers of one FSDP module: by what is attached, or as FSDP does them. It stays once and for ever,
    as :class:`distcomp.attaching.fsdp.Unit` does."""

    def __init__(self, name: str, module: FSDPModule) -> None:
        self.name = name
        self.attached: Gatherer | None = None
        try:
            module.set_custom_all_gather(self)  # type: ignore[arg-type]  # the base class is private
        except AttributeError as error:
            raise DistcompError(
                f"the gathers of {name} cannot be taken over: {error}; FSDP2 of PyTorch 2.9 or newer is "
                "needed"
            ) from error

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what is sent and received."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """FSDP's all-gather."""
        if self.attached is None:
            work: dist.Work | None = dist.all_gather_into_tensor(output_tensor, input_tensor, group, async_op)
            return work
        output_tensor.copy_(self.attached.gather(self.name, input_tensor))
        return None


_UNITS: WeakKeyDictionary[nn.Module, GatherUnit] = WeakKeyDictionary()


def gather_units(groups: Mapping[FSDPGroup, tuple[str, nn.Module]]) -> list[GatherUnit]:
    """The unit of every flat buffer, put there the first time."""
    for name, module in groups.values():
        if module not in _UNITS:
            _UNITS[module] = GatherUnit(name, module)  # type: ignore[arg-type]  # an FSDPModule, too
    return [_UNITS[module] for _, module in groups.values()]


def shard_layout(model: nn.Module, group: FSDPGroup, size: int) -> Layout:
    """What lies where in the flat buffer of one rank: each parameter's shard, padded to the longest.

    FSDP cuts a parameter of ``r`` rows into shards of ``ceil(r / size)``.
    """
    from torch.distributed.tensor import DTensor

    named = slices_of(model)
    slices = []
    for module, attribute in group.members:
        parameter = getattr(module, attribute)
        if not isinstance(parameter, DTensor):
            raise DistcompError(
                f"{attribute} of a {type(module).__name__} is gathered at the moment; attach before a "
                "forward, or call model.reshard() first"
            )
        whole = named[id(parameter)]
        (placement,) = parameter.placements
        dim = getattr(placement, "dim", 0)
        shape = list(parameter.shape) or [1]
        shape[dim] = math.ceil(shape[dim] / size)
        slices.append(ParamSlice(whole.name, tuple(shape), 0, math.prod(shape), whole.role))
    return Layout(tuple(slices))


class WeightGathers:
    """Carries the gathers of a model, and keeps what ``how`` remembers of each flat buffer.

    The state follows every gather, also that of a step which is skipped: it says what all ranks hold, and
    they do hold it. Only a gather of weights that are not finite on some rank leaves it as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Mapping[FSDPGroup, tuple[str, nn.Module]],
        how: WeightGather,
        among: Among,
        executor: Callable[[torch.device], Executor],
        seed: int,
    ) -> None:
        self._how = how
        self._among = among
        self._executor = executor
        self._seed = seed
        self._members = {name: group.members for group, (name, _) in groups.items()}
        self._layouts = {name: shard_layout(model, group, among.size) for group, (name, _) in groups.items()}
        self._frozen = FrozenWeights(how.compressor, among.size)
        self._states: dict[str, State] = {}
        self._loaded: dict[str, Tensor] = {}
        self._types: dict[str, torch.dtype] = {}

    def gather(self, name: str, shard: Tensor, step: int) -> Tensor:
        """All shards, in rank order (float32, equal on every rank)."""
        layout = self._checked(name, shard)
        self._types[name] = shard.dtype
        frozen = self._frozen_names(name, layout) if self._how.keeps_frozen else frozenset()
        if not frozen:
            return self._gathered(name, shard, layout, step)
        still = layout.select(lambda param: param.name in frozen)
        moving = layout.select(lambda param: param.name not in frozen)
        parts = [(still, self._frozen.gather(name, selected(shard, layout, still), still, self._once))]
        if moving.slices:
            parts.append((moving, self._gathered(name, selected(shard, layout, moving), moving, step)))
        return interleaved(parts, layout, self._among.size)

    def _gathered(self, name: str, shard: Tensor, layout: Layout, step: int) -> Tensor:
        state, size = self._states.get(name) or self._restored(layout), self._among.size
        if backward_number() != NO_BACKWARD:
            kept = self._how.again(state, layout, size, shard.dtype)
            if kept is not None:
                return kept
        x = shard.to(torch.float32, copy=True)  # FSDP gathers into the memory that the shard lies in
        gather, about = TypedGather(self._how, shard.dtype), (layout, step, self._seed)
        done = self._among.exchange(gather, x, state, about, self._executor(shard.device))
        result = done.result()
        if done.finite or not state:
            self._states[name] = result.state
        return result.estimate

    def _once(self, gather: TypedGather, own: Tensor, layout: Layout) -> Exchange:
        """Gather weights that stay what they are: in every run alike, whenever it begins."""
        return self._among.exchange(gather, own, {}, (layout, 0, self._seed), self._executor(own.device))

    def _frozen_names(self, name: str, layout: Layout) -> frozenset[str]:
        """The parameters of a flat buffer that are not trained now."""
        members = zip(layout.names, self._members[name], strict=True)
        return frozenset(of for of, (module, its) in members if not getattr(module, its).requires_grad)

    def _checked(self, name: str, shard: Tensor) -> Layout:
        layout = self._layouts[name]
        if not shard.is_floating_point():
            raise DistcompError(
                f"FSDP gathers the weights of {name} as bytes, because they have several types; give all "
                "parameters of a module one type (MixedPrecisionPolicy(param_dtype=...)), or leave weights= "
                "out"
            )
        if shard.numel() != layout.numel:
            raise DistcompError(
                f"FSDP gathers {shard.numel()} elements of {name}, and its parameters have {layout.numel}: "
                "they were changed since the model was attached; detach, then attach again"
            )
        return layout

    def _restored(self, layout: Layout) -> State:
        """What a checkpoint knows of the flat buffer, if it knows all of it."""
        if not all(name in self._loaded for name in layout.names):
            return {}
        return self._how.restored(torch.cat([self._loaded[name] for name in layout.names]))

    @property
    def state_bytes(self) -> int:
        """Bytes kept of the flat buffers that have been gathered."""
        return self._frozen.state_bytes + sum(
            self._how.state_bytes(self._moving(name), self._among.size, dtype)
            for name, dtype in self._types.items()
        )

    def _moving(self, name: str) -> Layout:
        """What is gathered again and again of a flat buffer."""
        layout = self._layouts[name]
        if not self._how.keeps_frozen:
            return layout
        frozen = self._frozen_names(name, layout)
        return layout.select(lambda param: param.name not in frozen)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """By parameter: what all ranks hold of this rank's shard (float32)."""
        saved: dict[str, dict[str, Tensor]] = {}
        for name, layout in self._layouts.items():
            state = self._states.get(name) or self._restored(layout)
            own = self._how.saved(state, self._among.rank, self._among.size)
            if own is not None:
                saved |= {PREFIX + param.name: {"held": piece.clone()} for param, piece in layout.pieces(own)}
        return saved

    def load_state_dict(self, saved: Mapping[str, Mapping[str, Tensor]], same_shards: bool) -> None:
        """Go on from it; with other shards begin anew, by one plain gather of each flat buffer."""
        self._states.clear()
        self._loaded = {}
        held = {
            name.removeprefix(PREFIX): one["held"] for name, one in saved.items() if name.startswith(PREFIX)
        }
        if held and not same_shards:
            warnings.warn(
                "what all ranks hold of the weights was saved by another number of shards; it begins anew, "
                "by one plain gather of each module",
                stacklevel=2,
            )
            return
        self._loaded = {name: value.reshape(-1) for name, value in held.items()}


def weight_gather_of(
    weights: WeightGather | Compressor | Method | str | None, target: Target
) -> WeightGather | None:
    """How weights are gathered. Raises DistcompError where there are no gathers to compress, or ranks that no
    line joins."""
    if weights is None:
        return None
    if target.shards is None:
        raise DistcompError(
            f"weights= says how an FSDP2 model gathers its shards, and {type(target.module).__name__} has "
            "none; leave it out, or wrap the model with fully_shard"
        )
    if target.inside is None and target.replicas not in (None, target.shards):
        raise DistcompError(
            "with replicas= the attached line joins those who hold the same shard, and weights are gathered "
            "among those who hold the others; leave weights= out, or say how gradients are reduced among "
            "them, too: replicas=distcomp.Replicas(mesh['replicate'], inside='qsgd:bits=8')"
        )
    return parse_weight_gather(weights)
