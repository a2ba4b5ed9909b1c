"""How one tensor becomes few bytes and comes back: alone, without any network."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from distcomp.grammar import checked, hints_of, nested, no_such, read_settings, split_call, write_call
from distcomp.kernels import memory
from distcomp.layout import Layout
from distcomp.payload import Parts, Payload, wire_bytes
from distcomp.plugins import lookup
from distcomp.randomness import Key
from distcomp.registry import COMPRESSORS, CompressorEntry


class Compressor(ABC):
    """A local, pure pair of functions: ``encode`` a flat buffer into a payload, ``decode`` it back.

    Subclasses are frozen dataclasses: their fields are their settings, and their ``repr`` is what ranks
    compare when they are attached. All numbers are float32 inside; a caller converts before and after.
    """

    summable: bool = False
    """Whether payloads may be added on the wire. They then hold one part, and the sum decodes to the sum."""

    unbiased: bool = False
    """Whether ``E[decode(encode(x))] = x``."""

    propagates_nonfinite: bool = False
    """Whether a NaN or an infinity in ``x`` is one in ``decode(encode(x))``, too, and in the sum of such
    payloads. Declared, never guessed: where it is not, ``x`` is looked at before it is encoded."""

    largest: float = math.inf
    """The largest value that the type on the wire holds, where that is less than float32's."""

    alignment: int = 1
    """A layout may be cut at multiples of this many elements of a parameter without changing any value."""

    def __str__(self) -> str:
        """The text that :func:`parse_compressor` makes its equal from; its ``repr`` where it has no name."""
        return _text_of(self)

    @abstractmethod
    def parts(self, layout: Layout) -> Parts:
        """What a payload for this layout holds. Depends on nothing but the layout: equal on every rank."""

    @abstractmethod
    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        """Compress a flat buffer (float32, ``[layout.numel]``) into a payload of :meth:`parts`; leave ``x``
        alone.

        All that is random comes from ``key`` and from where an element lies in its parameter, so that buckets
        cut otherwise give the same values.
        """

    @abstractmethod
    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        """Write the decoded buffer into ``out`` (float32, ``[layout.numel]``), or add it to what is there."""

    def decode(self, payload: Payload, layout: Layout) -> Tensor:
        """The decoded flat buffer (float32, ``[layout.numel]``)."""
        out = memory.empty(layout.numel, payload.wire.device)
        self.decode_into(out, payload, layout)
        return out

    def decode_onto(self, base: Tensor, payload: Payload, layout: Layout, times: float = 1.0) -> Tensor:
        """``base + times C(x)``, a new tensor; product and sum are rounded once."""
        if times != 1.0:
            return torch.add(base, self.decode(payload, layout), alpha=times)
        moved = memory.empty(layout.numel, base.device).copy_(base)
        self.decode_into(moved, payload, layout, add=True)
        return moved

    def mean_into(
        self, out: Tensor, payloads: Sequence[Payload], layout: Layout, own: tuple[int, Tensor] | None = None
    ) -> None:
        """Write the mean of what the payloads decode to into ``out`` (float32, ``[layout.numel]``), added in
        the order given; the one of number ``own[0]`` stands for ``own[1]``, and is not read."""
        for index, payload in enumerate(payloads):
            if own is not None and index == own[0]:
                torch.add(own[1], out if index else 0.0, out=out)
            else:
                self.decode_into(out, payload, layout, add=index > 0)
        out.mul_(1.0 / len(payloads))

    def subtract_from(self, out: Tensor, payload: Payload, layout: Layout) -> None:
        """Subtract the decoded flat buffer from ``out`` (float32, ``[layout.numel]``): what error feedback
        keeps."""
        out.sub_(self.decode(payload, layout))

    def encode_owing(self, x: Tensor, residual: Tensor, owed: Tensor, layout: Layout, key: Key) -> Payload:
        """The payload of ``x + residual``; what it does not stand for goes into ``owed``: error feedback.

        Bit for bit what adding, :meth:`encode` and :meth:`subtract_from` give; quantizers do it in one pass.
        All three are float32, ``[layout.numel]``, and different tensors.
        """
        torch.add(x, residual, out=owed)
        payload = self.encode(owed, layout, key)
        self.subtract_from(owed, payload, layout)
        return payload

    def wire_bytes(self, layout: Layout) -> int:
        """Bytes of one payload, header included, known before anything is encoded."""
        return wire_bytes(self.parts(layout))

    def omega(self, numel: int) -> float | None:
        """A bound of the variance: ``E|C(x)-x|^2 <= omega |x|^2``, for unbiased compressors; None if not
        unbiased."""
        return None

    def delta(self, numel: int) -> float | None:
        """A contraction: ``E|C(x)-x|^2 <= (1-delta) |x|^2`` with delta > 0; None where there is none."""
        omega = self.omega(numel)
        # Unbiased, so E|C(x)-x|^2 <= omega |x|^2 is the contraction's own inequality; from omega = 1 on it
        # says nothing, and whoever needs a contraction must damp (distcomp.compressors.contraction).
        return 1 - omega if omega is not None and omega < 1 else None


Kind = TypeVar("Kind", bound=type[Compressor])


def register_compressor(name: str) -> Callable[[Kind], Kind]:
    """Enter a class under the field's name for it, in lower case: its fields are what a text may set."""

    def enter(kind: Kind) -> Kind:
        COMPRESSORS[name] = CompressorEntry(name, kind)
        return kind

    return enter


def register_preset(name: str, compressor: Compressor) -> None:
    """Enter one compressor, settings included, under a name of its own: ``int8``."""
    COMPRESSORS[name] = CompressorEntry(name, lambda: compressor)


def parse_compressor(given: Compressor | str) -> Compressor:
    """A compressor, given as one or as its text: ``quantize:bits=4``, ``topk:ratio=0.01``, ``int8``.

    Raises DistcompError for a name that no compressor has, settings that it does not have, or values of
    another kind.
    """
    if isinstance(given, Compressor):
        return given
    name, texts = split_call(given, "compressor")
    entry = lookup(COMPRESSORS, name)
    if entry is None:
        raise no_such("compressor", name, COMPRESSORS)
    with nested():
        settings = read_settings(name, texts, entry.make)
        hints = hints_of(entry.make)
        for key, value in settings.items():
            # A text is a compressor only where one is asked for: "max" of norm=max stays a text.
            if isinstance(value, str) and isinstance(hints[key], type) and issubclass(hints[key], Compressor):
                settings[key] = parse_compressor(value)
        made: Compressor = entry.make(**checked(name, settings, entry.make))
    return made


def _text_of(compressor: Compressor) -> str:
    """``name:key=value`` of the class with what differs from its defaults, or a preset's name."""
    by_class = next((entry.name for entry in COMPRESSORS.values() if entry.make is type(compressor)), None)
    settings = _unusual(compressor)
    if by_class is not None and not settings:
        return by_class
    presets = (entry for entry in COMPRESSORS.values() if not isinstance(entry.make, type))
    preset = next((entry.name for entry in presets if entry.make() == compressor), None)
    if preset is not None:
        return preset
    return repr(compressor) if by_class is None else write_call(by_class, settings)


def _unusual(compressor: Any) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    settings = {}
    for field in dataclasses.fields(compressor):
        factory = field.default_factory
        usual = field.default if factory is dataclasses.MISSING else factory()
        if getattr(compressor, field.name) != usual:
            settings[field.name] = getattr(compressor, field.name)
    return settings
