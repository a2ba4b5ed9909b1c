"""Which parameters, or which of their coordinates, can have a gradient in this step.

A source of active parameters (:class:`ActiveParameters`) is a frozen value that answers with an
:class:`ActiveSet`: a function of the step's context, never of a live object, so that all ranks, a copied
method and a resumed run come to the same answer. What is inactive is not sent and not decayed, and what is
owed to it stays owed (:class:`distcomp.methods.ActiveOnly`).

What the step and the keys do not determine, such as the masks of a pruner or which parameters were used, is
*observed* by the training loop, once a step, and handed over in the context as immutable values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.layout import Layout, ParamSlice
from distcomp.randomness import Key

Observed = Mapping[str, object]
"""What the training loop has seen, by who asks for it; immutable values."""

NOTHING_OBSERVED: Observed = {}
"""Where there is no training loop, or it has seen nothing."""

FROZEN = "frozen"
"""Observed: a frozenset of the names of parameters that no rank trains in this step."""


class Context(Protocol):
    """What an active set is a function of: equal on all ranks in one step."""

    @property
    def step(self) -> int:
        """The number of the step."""

    @property
    def shared(self) -> Key:
        """The random key that all ranks have in common in this step."""

    @property
    def observed(self) -> Observed:
        """What the training loop has seen by this step."""


@dataclass(frozen=True)
class Planned:
    """The context of a step that nobody has taken yet, to plan its bytes: of a run with seed 0, in which
    nothing was observed."""

    step: int = 0

    @property
    def shared(self) -> Key:
        """That of seed 0."""
        return Key.of(0, self.step)

    @property
    def observed(self) -> Observed:
        """Nothing."""
        return NOTHING_OBSERVED


Elements = Tensor | None
"""Which elements of a slice, flattened: int64 ``[active]``, rising; None for all of them."""


@dataclass(frozen=True, eq=False)
class ActiveSet:
    """The active coordinates of a flat tensor: where they are, and the layout of the tensor that they make.

    A parameter of which whole rows and columns are active (filters, channels) stays a matrix, or a stack of
    kernels, of fewer rows and columns: methods for matrices work on it. Otherwise its active elements are a
    vector. A parameter of which nothing is active is absent from :attr:`layout`.
    """

    layout: Layout
    """Of the active coordinates, laid end to end."""
    whole: Layout
    """Of the tensor that they are taken from."""
    elements: Mapping[str, tuple[ParamSlice, Elements]] = field(repr=False)
    """By the name of an active parameter: its slice in :attr:`whole`, and which of its elements."""

    @cached_property
    def indices(self) -> Tensor | None:
        """Into the whole tensor: int64 ``[layout.numel]``, rising; None where all of it is active."""
        if self.layout == self.whole:
            return None
        indices = []
        for param, at in zip(self.whole.slices, self.whole.offsets, strict=True):
            if param.name in self.elements:
                _, chosen = self.elements[param.name]
                indices.append(torch.arange(at, at + param.numel) if chosen is None else at + chosen)
        return torch.cat(indices) if indices else torch.empty(0, dtype=torch.int64)

    @cached_property
    def _runs(self) -> list[tuple[int, int]] | None:
        """The active stretches of the whole tensor, where whole parameters are active and no others: what is
        cut out by them is copied ten times faster than element by element."""
        if any(chosen is not None for _, chosen in self.elements.values()):
            return None
        runs: list[tuple[int, int]] = []
        for param, at in zip(self.whole.slices, self.whole.offsets, strict=True):
            if param.name in self.elements:
                begin = runs.pop()[0] if runs and runs[-1][1] == at else at
                runs.append((begin, at + param.numel))
        return runs

    @staticmethod
    def all(layout: Layout) -> ActiveSet:
        """Everything."""
        return ActiveSet(layout, layout, {param.name: (param, None) for param in layout.slices})

    @staticmethod
    def of(layout: Layout, masks: Mapping[str, Tensor | bool]) -> ActiveSet:
        """The set of what ``masks`` say, by parameter name: a bool tensor of the parameter's shape, True or
        False.

        Parameters that ``masks`` leave out are active. Raises DistcompError for a mask of another shape.
        """
        active = {param.name: _bits(param, masks.get(param.name, True)) for param in layout.slices}
        return _collect(layout, active)

    def intersection(self, other: ActiveSet) -> ActiveSet:
        """What is active in both sets, which are of one layout."""
        if self.whole != other.whole:
            raise DistcompError("active sets of two layouts have no intersection; ask both about one layout")
        both = {param.name: _both(self._bits_of(param), other._bits_of(param)) for param in self.whole.slices}
        return _collect(self.whole, both)

    def _bits_of(self, param: ParamSlice) -> Tensor | bool:
        if param.name not in self.elements:
            return False
        _, elements = self.elements[param.name]
        if elements is None:
            return True
        bits = torch.zeros(param.numel, dtype=torch.bool)
        bits[elements] = True
        return bits

    def pick(self, buffer: Tensor) -> Tensor:
        """The active coordinates of a flat tensor ``[whole.numel]``, in order: ``[layout.numel]``."""
        if self.layout == self.whole:
            return buffer
        if self._runs is not None:
            return torch.cat([buffer[begin:end] for begin, end in self._runs] or [buffer[:0]])
        assert self.indices is not None
        return buffer[self.indices.to(buffer.device)]

    def spread(self, active: Tensor) -> Tensor:
        """A whole flat tensor with zeros where nothing is active."""
        if self.layout == self.whole:
            return active
        return self._write(active.new_zeros(self.whole.numel), active)

    def put(self, buffer: Tensor, active: Tensor) -> Tensor:
        """A copy of ``buffer`` with its active coordinates replaced."""
        return active if self.layout == self.whole else self._write(buffer.clone(), active)

    def complement(self, buffer: Tensor) -> Tensor:
        """The flat tensor with zeros where something is active: a copy."""
        if self.layout == self.whole:
            return torch.zeros_like(buffer)
        return self._write(buffer.clone(), buffer.new_zeros(self.layout.numel))

    def _write(self, buffer: Tensor, active: Tensor) -> Tensor:
        """``buffer`` itself, with its active coordinates replaced."""
        if self._runs is None:
            assert self.indices is not None
            buffer[self.indices.to(buffer.device)] = active
            return buffer
        at = 0
        for begin, end in self._runs:
            buffer[begin:end] = active[at : at + end - begin]
            at += end - begin
        return buffer

    @cached_property
    def digest(self) -> int:
        """63 bits of a hash over the parameters and their active elements: what ranks compare."""
        state = blake2b(digest_size=8)
        for param in self.whole.slices:
            state.update(f"{param.name}:{param.start}+{param.numel};".encode())
            bits = self._bits_of(param)
            state.update(
                bytes([bits]) if isinstance(bits, bool) else bits.view(torch.uint8).numpy().tobytes()
            )
        return int.from_bytes(state.digest(), "little") & (2**63 - 1)


def _bits(param: ParamSlice, mask: Tensor | bool) -> Tensor | bool:
    """Which elements of a slice its parameter's mask has active."""
    if isinstance(mask, bool):
        return mask
    if tuple(mask.shape) != param.shape or mask.dtype != torch.bool:
        raise DistcompError(
            f"the mask of {param.name} is {mask.dtype} {list(mask.shape)} and the parameter has the shape "
            f"{list(param.shape)}; give a bool tensor of that shape, True or False"
        )
    return mask.reshape(-1)[param.start : param.stop].cpu()


def _both(first: Tensor | bool, other: Tensor | bool) -> Tensor | bool:
    if isinstance(first, bool):
        return other if first else False
    if isinstance(other, bool):
        return first if other else False
    return first & other


def _collect(layout: Layout, active: Mapping[str, Tensor | bool]) -> ActiveSet:
    """The set, from the bits of each slice."""
    slices = []
    elements: dict[str, tuple[ParamSlice, Elements]] = {}
    for param in layout.slices:
        bits = active[param.name]
        if bits is True or (isinstance(bits, Tensor) and bool(bits.all())):
            slices.append(param)
            elements[param.name] = (param, None)
        elif isinstance(bits, Tensor) and bool(bits.any()):
            chosen = bits.nonzero().squeeze(1)
            slices.append(_survivors(param, bits, chosen.numel()))
            elements[param.name] = (param, chosen)
    return ActiveSet(layout if tuple(slices) == layout.slices else Layout(tuple(slices)), layout, elements)


def _survivors(param: ParamSlice, bits: Tensor, count: int) -> ParamSlice:
    """The slice that a parameter's active elements make: a box where they are one, else a vector."""
    shape: tuple[int, ...] = (count,)
    if param.whole and len(param.shape) >= 2:
        mask = bits.view(param.shape)
        rows = int(mask.flatten(1).any(1).sum())
        columns = int(mask.transpose(0, 1).flatten(1).any(1).sum())
        # Whole rows crossed with whole columns, and nothing else, make a matrix again: if as many elements
        # are active as the box has.
        box = (rows, columns, *param.shape[2:])
        shape = box if torch.Size(box).numel() == count else shape
    return ParamSlice(param.name, shape, 0, count, param.role)


class Observable(Protocol):
    """A live object of the training loop that a source of active parameters depends on."""

    def snapshot(self) -> object:
        """What it is in the step under way: an immutable value, equal on all ranks."""


OBSERVABLES: WeakValueDictionary[str, Observable] = WeakValueDictionary()
"""By name in this process: whom the training loop asks for what it hands to sources of that name."""


class ActiveParameters(ABC):
    """A source of active parameters. Subclasses are frozen dataclasses; their ``repr`` is what ranks compare
    when they attach.

    The answer is a function of its arguments: whoever reads a live module, a global generator or the time in
    it is found out by the digest that :class:`distcomp.methods.ActiveOnly` has the ranks compare.
    """

    keeps_dense_grad: bool = False
    """Whether inactive coordinates have gradients all the same, which are owed until they are sent.
    Otherwise what they hold is no gradient, and is forgotten."""

    observes: str = ""
    """The name in :data:`OBSERVABLES` under which the training loop observes something for this source."""

    @abstractmethod
    def active(self, layout: Layout, context: Context) -> ActiveSet:
        """What of ``layout`` is active in this step; equal on all ranks."""


@dataclass(frozen=True)
class Intersection(ActiveParameters):
    """What all sources have active."""

    sources: tuple[ActiveParameters, ...]

    @property
    def keeps_dense_grad(self) -> bool:  # type: ignore[override]
        return any(source.keeps_dense_grad for source in self.sources)

    def active(self, layout: Layout, context: Context) -> ActiveSet:
        common = ActiveSet.all(layout)
        for source in self.sources:
            common = common.intersection(source.active(layout, context))
        return common


@dataclass(frozen=True)
class Frozen(ActiveParameters):
    """All parameters but those that no rank trains in this step (``requires_grad=False``, or unused).

    They are observed where the model is attached to: by names, under :data:`FROZEN`. ``keeps_dense_grad``: in
    averaging, whether what a parameter had learnt since the last exchange, before it was frozen, waits until
    it is trained again.
    """

    keeps_dense_grad: bool = False

    def active(self, layout: Layout, context: Context) -> ActiveSet:
        names = context.observed.get(FROZEN, frozenset())
        assert isinstance(names, frozenset)
        return ActiveSet.of(layout, dict.fromkeys(names, False))
