"""Convolutions and products of signs, 64 of them to a word: xor and population count in the place of floats.

Exact: the sum of n products of signs is ``n - 2 p``, where p of them differ. The C extension and the plain
torch reference give the same bits, as all sums are integers below 2^24.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.kernels.dispatch import backend

WORD = 64
LANES = 8


def pack_filters(w: Tensor) -> Tensor:
    """Signs of filters, ``[outputs, channels, kh, kw]`` -> int64 ``[groups, kh kw, words, 8]``: bit 1 for -1.

    Outputs are padded to a multiple of 8, channels to one of 64; what is added is never looked at, or is the
    same in inputs.
    """
    outputs, channels, kh, kw = w.shape
    bits = (w < 0).permute(0, 2, 3, 1).reshape(outputs, kh * kw, channels)
    bits = torch.nn.functional.pad(bits, (0, -channels % WORD, 0, 0, 0, -outputs % LANES))
    words = _words(bits)
    return words.view(-1, LANES, kh * kw, words.shape[-1]).permute(0, 2, 3, 1).contiguous()


def unpack_filters(words: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """The signs that :func:`pack_filters` was given, as float32."""
    outputs, channels, kh, kw = shape
    rows = words.permute(0, 3, 1, 2).reshape(-1, kh * kw, words.shape[2], 1)
    bits = (rows >> torch.arange(WORD, device=words.device)) & 1
    bits = bits.reshape(-1, kh * kw, words.shape[2] * WORD)[:outputs, :, :channels]
    return (1.0 - 2.0 * bits).view(outputs, kh, kw, channels).permute(0, 3, 1, 2).contiguous()


def _words(bits: Tensor) -> Tensor:
    return (bits.view(*bits.shape[:-1], -1, WORD).long() << torch.arange(WORD, device=bits.device)).sum(-1)


def binary_conv2d(
    x: Tensor,
    words: Tensor,
    shape: tuple[int, int, int, int],
    scale: Tensor,
    bias: Tensor,
    stride: int = 1,
    padding: int = 0,
) -> Tensor:
    """``conv2d(sign(x), signs) * scale + bias`` with zero padding; sign(0) = +1.

    Args:
        x: float32 ``[samples, channels, height, width]``; its signs count.
        words: what :func:`pack_filters` made of filters of this ``shape``.
        scale: float32 ``[outputs]``, as ``bias``.

    Raises DistcompError where the shapes do not fit, or the output would be empty.
    """
    outputs, channels, kh, kw = shape
    if x.dim() != 4 or x.shape[1] != channels or x.dtype != torch.float32:
        raise DistcompError(
            f"the input is {tuple(x.shape)} of {x.dtype}; pass float32 with {channels} channels, four "
            "dimensions"
        )
    samples, _, height, width = x.shape
    made = ((height + 2 * padding - kh) // stride + 1, (width + 2 * padding - kw) // stride + 1)
    if min(made) < 1:
        raise DistcompError(f"a kernel of {kh} x {kw} does not fit into {height} x {width}")
    if backend(x.device) != "cpu":
        signs = torch.where(x < 0, -torch.ones_like(x), 1.0)
        y = torch.nn.functional.conv2d(signs, unpack_filters(words, shape), None, stride, padding)
        return y * scale.view(-1, 1, 1) + bias.view(-1, 1, 1)
    _check_filters(words, shape, scale, bias)
    cpu = _extension()
    packed = _packed_signs(x, samples, channels, height * width)
    out = torch.empty(samples, outputs, *made, dtype=torch.float32)
    cpu.binary_conv(
        *_buffers(packed, words, scale, bias, out), samples, (channels, height, width),
        (outputs, kh, kw, stride, padding), made, False, _plain(cpu),
    )  # fmt: skip
    return out


def binary_linear(
    x: Tensor, words: Tensor, shape: tuple[int, int, int, int], scale: Tensor, bias: Tensor
) -> Tensor:
    """``sign(x) signs^T * scale + bias``; ``shape`` is ``(outputs, inputs, 1, 1)``.

    x: float32 ``[..., inputs]``. Raises DistcompError where it has another size or type.
    """
    outputs, inputs = shape[:2]
    if x.shape[-1] != inputs or x.dtype != torch.float32:
        raise DistcompError(f"the input is {tuple(x.shape)} of {x.dtype}; pass float32 of {inputs} values")
    rows = x if x.dim() == 2 else x.reshape(-1, inputs)
    count = rows.shape[0]
    if not count:
        return x.new_empty(*x.shape[:-1], outputs)
    if backend(x.device) != "cpu":
        y = torch.where(rows < 0, -torch.ones_like(rows), 1.0) @ unpack_filters(words, shape).flatten(1).T
        return (y * scale + bias).view(*x.shape[:-1], outputs)
    _check_filters(words, shape, scale, bias)
    cpu = _extension()
    packed = _packed_signs(rows, count, inputs, 1)
    out = torch.empty(
        count, outputs, dtype=torch.float32
    )  # rows are the places of one line of an image, and stay rows
    cpu.binary_conv(
        *_buffers(packed, words, scale, bias, out), 1, (inputs, 1, count),
        (outputs, 1, 1, 1, 0), (1, count), True, _plain(cpu),
    )  # fmt: skip
    return out if x.dim() == 2 else out.view(*x.shape[:-1], outputs)


def _check_filters(words: Tensor, shape: tuple[int, int, int, int], scale: Tensor, bias: Tensor) -> None:
    """Raise DistcompError unless these are as many words, scales and biases as filters of ``shape`` have."""
    outputs, channels, kh, kw = shape
    wanted = (-(-outputs // LANES), kh * kw, -(-channels // WORD), LANES)
    floats = all(
        one.numel() == outputs and one.dtype == torch.float32 and one.is_contiguous() for one in (scale, bias)
    )
    if not floats or words.shape != wanted or words.dtype != torch.int64 or not words.is_contiguous():
        raise DistcompError(
            f"filters of {shape} are {wanted} words of int64 with {outputs} float32 scales and biases, and "
            f"these are {tuple(words.shape)} of {words.dtype}, {scale.numel()} and {bias.numel()}; pack them "
            "with pack_filters"
        )


def _packed_signs(x: Tensor, samples: int, channels: int, places: int) -> Tensor:
    """int64 ``[samples, places, words]``."""
    cpu, x = _extension(), x.contiguous()
    packed = torch.empty(samples, places, -(-channels // WORD), dtype=torch.int64)
    cpu.pack_signs(*_buffers(x, packed), samples, channels, places, _plain(cpu))
    return packed


def _buffers(*tensors: Tensor) -> tuple[Any, ...]:
    """What C is told of tensors: where they are, and how many elements each has."""
    return *(one.data_ptr() for one in tensors), tuple(one.numel() for one in tensors)


@cache
def _extension() -> Any:
    return import_module("distcomp.kernels._cpu")


def _plain(cpu: Any) -> bool:
    """Whether the plain instruction set was asked for (``_cpu.use("generic")``)."""
    return bool(cpu.instruction_set() == "generic")
