"""The same numbers, faster: quantize, dequantize and check flat fp32 tensors, bit for bit alike anywhere.

:mod:`distcomp.kernels.reference` is the specification in plain torch. ``_cpu.c`` (CPU) and
:mod:`distcomp.kernels.triton` (GPU) equal it bit for bit. Which one serves a tensor is decided by its device;
:func:`backend` tells, and the environment variable ``DISTCOMP_KERNELS=reference|cpu|triton`` forces one.

Every function takes one contiguous 1-D tensor, one parameter's piece, cut in blocks of ``block`` elements
of which the last may be short. What starts on a block boundary may be processed on its own: splitting a
tensor there changes no byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.kernels.dispatch import backend, implementation
from distcomp.kernels.packing import NORMS, Coding, levels, packed_bytes, scale_count

__all__ = [
    "all_finite",
    "backend",
    "checksum",
    "dequantize",
    "exponents",
    "levels",
    "packed_bytes",
    "permuted",
    "quantize",
    "scale_by_exponents",
    "scale_count",
]


def quantize(
    x: Tensor,
    codes_out: Tensor,
    scales_out: Tensor,
    *,
    block: int = 512,
    bits: int,
    key: int = 0,
    first: int = 0,
    stochastic: bool = True,
    norm: str = "max",
    powers: bool = False,
) -> None:
    """Cut ``x`` in blocks and write each as a scale and packed ``bits``-bit codes.

    Two bits and up: scale = max|x| over the block, s = 2^(bits-1) - 1,
    code = floor(clamp(x * (s / scale), -s, s) + u) + s with u uniform in [0, 1), so that E[decoded] = x;
    ``stochastic=False`` rounds half to even instead. One bit: code = [x >= 0], scale = mean|x|, not random.
    ``powers``: levels are 0, 2^(1-s), ..., 1/2 and 1 times the scale; one beside x is taken at random, with
    the right mean: code 0 .. s, and s more for negative values.
    A block whose scale is below 2^-120 is sent as zeros. A NaN or inf makes its block's scale, and so every
    decoded value of that block, non-finite.

    Args:
        x: float32, 1-D, contiguous: one parameter, or a piece of it that starts at element ``first``.
        codes_out: uint8 of exactly ``packed_bytes(x.numel(), block, bits)``.
        scales_out: float32 of exactly ``scale_count(x.numel(), block)``.
        norm: the scale: ``max``; ``l2``, the Euclidean norm; or ``given``: scales are read instead of written
            (a shared maximum; one bit does not even look at them).
        key: 64 bits that key the randomness; u is a function of (key, first + j mod 2^32) and nothing else.
        first: index of ``x[0]`` within its parameter, a multiple of ``block``.

    On the wire: ``packed_bytes`` + 4 * ``scale_count`` bytes; the codes are numel * bits / 8 where blocks are
    multiples of 8.

    Raises:
        DistcompError: a tensor of another type, size or device, or a setting out of range.

    QSGD (Alistarh et al. 2017) with the maximum for the norm, as in its experiments; ternary is ``bits=2``,
    sign is ``bits=1``. Differs from the paper: a code has a fixed width and the levels are symmetric.
    """
    _check(x, codes_out, scales_out, block, bits)
    if norm not in NORMS or (powers and bits < 2):
        raise DistcompError(
            f"there are no {bits}-bit codes of norm {norm!r}, powers={powers}; norms: {NORMS}"
        )
    if first % block:
        raise DistcompError(f"first={first} is not a multiple of block={block}; split only between blocks")
    implementation(x.device).quantize(
        x, codes_out, scales_out,
        block=block, bits=bits, key=key, first=first, coding=Coding(stochastic, norm, powers),
    )  # fmt: skip


def dequantize(
    codes: Tensor,
    scales: Tensor,
    out: Tensor,
    *,
    block: int = 512,
    bits: int,
    powers: bool = False,
    add: bool = False,
    subtract: bool = False,
    times: float = 1.0,
) -> None:
    """Write into ``out`` what :func:`quantize` packed: (code - s) * (scale / s), or +-scale for one bit; with
    ``powers`` the level times the scale.

    ``add``: out = (out + decoded) * times. ``subtract``: out = (out - decoded) * times, which turns what was
    encoded into the residual that error feedback keeps. Neither: out = decoded * times. ``out`` is read and
    written once; ``times`` is rounded to fp32 (pass 1 / n with the last payload of a mean). Every operation
    rounds on its own.

    Shapes, types and errors as in :func:`quantize`.
    """
    _check(out, codes, scales, block, bits)
    if add and subtract:
        raise DistcompError("dequantize was asked to add and to subtract at once; choose one")
    sign = int(add) - int(subtract)
    implementation(out.device).dequantize(
        codes, scales, out, block=block, bits=bits, powers=powers, sign=sign, times=times
    )


def all_finite(x: Tensor) -> bool:
    """True if no element of a float32, float16 or bfloat16 tensor is inf or NaN. A GPU is waited for."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not x.is_contiguous():
        raise DistcompError(f"all_finite takes contiguous float32, float16 or bfloat16, not {_describe(x)}")
    return implementation(x.device).all_finite(x)


def checksum(data: Tensor) -> int:
    """64-bit checksum: sum((i + 1) * w_i) mod 2^32 in the high half, sum(w_i) mod 2^32 in the low.

    w_i are the little-endian uint32 words of the uint8 ``data``, the tail padded with zeros (so send
    the length too). Finds every changed word and any two exchanged ones; meant for accidents, not an
    adversary.
    """
    if data.dtype != torch.uint8 or data.dim() != 1 or not data.is_contiguous():
        raise DistcompError(f"checksum takes contiguous 1-D uint8, not {_describe(data)}; view it as uint8")
    return implementation(data.device).checksum(data)


def permuted(count: int, numel: int, keys: tuple[int, ...]) -> Tensor:
    """``count`` different places below ``numel``: the first images under a permutation that six 64-bit keys
    choose.

    int64, on the CPU. Costs what ``count`` costs, whatever ``numel`` is.
    """
    if not 0 <= count <= numel or len(keys) != 6:
        raise DistcompError(
            f"permuted({count}, {numel}) with {len(keys)} keys; give six keys and count <= numel"
        )
    return implementation(torch.device("cpu")).permuted(count, numel, keys)


def exponents(x: Tensor, codes: Tensor, *, key: int, first: int) -> None:
    """Write into ``codes`` (uint8) the exponent of each value after it was rounded to a power of two, at
    random so that the mean is right: ``(magnitude bits + 23 random bits) >> 23``, at most 254.

    ``key`` and ``first`` as in :func:`quantize`; ``first`` may be any place.
    """
    _check_flat("values", x, torch.float32, x.numel(), x)
    _check_flat("codes", codes, torch.uint8, x.numel(), x)
    implementation(x.device).exponents(x, codes, key=key, first=first)


def scale_by_exponents(codes: Tensor, out: Tensor) -> None:
    """Multiply ``out`` (float32) by the powers of two that ``codes`` (uint8) are the exponents of."""
    _check_flat("values", out, torch.float32, out.numel(), out)
    _check_flat("codes", codes, torch.uint8, out.numel(), out)
    implementation(out.device).scale_by_exponents(codes, out)


def _check(x: Tensor, codes: Tensor, scales: Tensor, block: int, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise DistcompError(f"bits={bits} is not a width kernels know; choose 1 to 8")
    if block < 1:
        raise DistcompError(f"block={block} is not a block size; choose 1 or more (512 is the default)")
    _check_flat("values", x, torch.float32, x.numel(), x)
    _check_flat("codes", codes, torch.uint8, packed_bytes(x.numel(), block, bits), x)
    _check_flat("scales", scales, torch.float32, scale_count(x.numel(), block), x)


def _check_flat(what: str, tensor: Tensor, dtype: torch.dtype, numel: int, like: Tensor) -> None:
    flat = tensor.dim() == 1 and tensor.is_contiguous()
    if not flat or tensor.dtype != dtype or tensor.device != like.device:
        raise DistcompError(
            f"the {what} are {_describe(tensor)}; pass a contiguous 1-D {dtype} tensor on {like.device}"
        )
    if tensor.numel() != numel:
        raise DistcompError(
            f"the {what} have {tensor.numel()} elements where {numel} are needed; "
            "size them with packed_bytes() and scale_count()"
        )


def _describe(tensor: Tensor) -> str:
    layout = "contiguous" if tensor.is_contiguous() else "strided"
    return f"a {layout} {tensor.dim()}-D {tensor.dtype} tensor on {tensor.device}"
