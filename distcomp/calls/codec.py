"""What a call does to a tensor before it is sent: nothing, bit for bit, or what a compressor does."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.compressors import Compressor, Identity
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods import Method
from distcomp.methods.registry import compressor_of
from distcomp.payload import Part, Parts, Payload
from distcomp.randomness import Key

Shape = tuple[int, ...]
CodecLike = Method | Compressor | str


class Codec(ABC):
    """A tensor as a payload, and back as a flat tensor."""

    exact: bool
    """Whether what comes back is what was sent, bit for bit."""

    @abstractmethod
    def parts(self, shape: Shape) -> Parts:
        """What a payload of a tensor of this shape holds."""

    @abstractmethod
    def encode(self, x: Tensor, key: Key) -> Payload:
        """The payload of ``x``, which is left alone."""

    @abstractmethod
    def decode(self, payload: Payload, shape: Shape) -> Tensor:
        """What came of a tensor of this shape: flat, for :func:`restored`."""


@dataclass(frozen=True)
class Exact(Codec):
    """The values as they are, of any dtype. Bytes: those of the tensor."""

    dtype: torch.dtype
    exact = True

    def parts(self, shape: Shape) -> Parts:
        return (Part("values", self.dtype, math.prod(shape)),)

    def encode(self, x: Tensor, key: Key) -> Payload:
        payload = Payload.empty(self.parts(tuple(x.shape)), x.device)
        payload["values"].copy_(x.reshape(-1))
        return payload

    def decode(self, payload: Payload, shape: Shape) -> Tensor:
        return payload["values"]


@dataclass(frozen=True)
class Lossy(Codec):
    """A compressor's payload; float32 inside, two numbers where they are complex. Bytes:
    ``compressor.wire_bytes``."""

    compressor: Compressor
    is_complex: bool
    exact = False

    def layout(self, shape: Shape) -> Layout:
        return layout_of((*shape, 2) if self.is_complex else shape)

    def parts(self, shape: Shape) -> Parts:
        return self.compressor.parts(self.layout(shape))

    def encode(self, x: Tensor, key: Key) -> Payload:
        return self.compressor.encode(as_float32(x), self.layout(tuple(x.shape)), key)

    def decode(self, payload: Payload, shape: Shape) -> Tensor:
        return self.compressor.decode(payload, self.layout(shape))


def codec_for(chosen: CodecLike, dtype: torch.dtype) -> Codec:
    """The codec that is asked for, of tensors of a dtype.

    Raises DistcompError for a method that is more than a compressor, and for whole numbers, which only
    ``identity`` keeps.
    """
    compressor = _compressor_named(chosen) if isinstance(chosen, str) else compressor_of(chosen)
    if isinstance(compressor, Identity):
        return Exact(dtype)
    check_lossy(compressor, dtype)
    return Lossy(compressor, dtype.is_complex)


@functools.lru_cache(maxsize=64)
def _compressor_named(text: str) -> Compressor:
    """Read once: a loop gives the same few texts in every call, and compressors have no state."""
    return compressor_of(text)


def check_lossy(chosen: CodecLike, dtype: torch.dtype) -> None:
    """Raise DistcompError for whole numbers."""
    if not dtype.is_floating_point and not dtype.is_complex:
        raise DistcompError(
            f"{chosen!s} is for floating-point numbers and this tensor is of {dtype}; use 'identity', which "
            "sends every dtype as it is"
        )


def layout_of(shape: Shape) -> Layout:
    """A tensor of fewer than two dimensions is one row: methods send a model's biases as they are, and this
    is none."""
    return Layout.of([("tensor", shape if len(shape) >= 2 else (1, math.prod(shape)))], {"tensor": "matrix"})


def as_float32(x: Tensor) -> Tensor:
    """``x``, flat, in float32: two numbers for a complex one."""
    real = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return real.reshape(-1).to(torch.float32)


def restored(flat: Tensor, like: Tensor) -> Tensor:
    """A flat answer in the shape and dtype of ``like``."""
    if like.is_complex() and not flat.is_complex():
        flat = torch.view_as_complex(flat.reshape(-1, 2))
    return flat.view(like.shape).to(like.dtype)
