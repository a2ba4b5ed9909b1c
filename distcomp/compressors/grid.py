"""What several compressors share: blocks as rows, numbers per parameter, noise, packed signs."""

from __future__ import annotations

import torch
from torch import Tensor

from distcomp import kernels
from distcomp.kernels import reference
from distcomp.kernels.two_means import SIGNS
from distcomp.layout import Layout
from distcomp.randomness import Key

WHOLE = 2**62
"""An alignment that no parameter reaches: it is never cut."""


def to_rows(x: Tensor, layout: Layout, block: int) -> Tensor:
    """The blocks of a flat buffer as the rows of a matrix, each parameter beginning a new row; padded with
    zeros."""
    # A block never spans two parameters: its scale must not depend on which of them share a bucket.
    rows = torch.zeros(layout.block_count(block), block, dtype=x.dtype, device=x.device)
    flat, at = rows.view(-1), 0
    for _, piece in layout.pieces(x):
        flat[at : at + piece.numel()] = piece
        at += -(-piece.numel() // block) * block
    return rows


def from_rows(rows: Tensor, layout: Layout) -> Tensor:
    """The flat buffer again: what :func:`to_rows` was given."""
    block = rows.shape[1]
    flat, at, pieces = rows.reshape(-1), 0, []
    for param in layout.slices:
        pieces.append(flat[at : at + param.numel])
        at += -(-param.numel // block) * block
    return torch.cat(pieces) if pieces else flat


def spread(values: Tensor, layout: Layout) -> Tensor:
    """One number per parameter, repeated for each of its elements: ``[slices] -> [numel]``."""
    counts = torch.tensor([param.numel for param in layout.slices], dtype=torch.int64, device=values.device)
    return torch.repeat_interleave(values, counts, output_size=layout.numel)


def per_parameter_max(x: Tensor, layout: Layout) -> Tensor:
    """``max |x|`` of each parameter, 0 where it is empty: ``[numel] -> [slices]``."""
    # amax refuses what is empty; the sum of nothing is a 0 on the same device.
    return _stack([piece.abs().amax() if piece.numel() else piece.sum() for _, piece in layout.pieces(x)], x)


def per_parameter_mean(x: Tensor, layout: Layout) -> Tensor:
    """``mean |x|`` of each parameter, 0 where it is empty: ``[numel] -> [slices]``."""
    return _stack([piece.abs().mean() if piece.numel() else piece.sum() for _, piece in layout.pieces(x)], x)


def _stack(scalars: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(scalars) if scalars else like.new_empty(0)


def uniform_noise(layout: Layout, key: Key, device: torch.device) -> Tensor:
    """A number in [0, 1) for each element: a function of key, parameter name and place in the parameter."""
    # By the place in the parameter, not in the buffer: buckets that are cut otherwise draw the same numbers.
    pieces = [
        reference.uniform(param.numel, key.fold(param.name).bits, param.start, device)
        for param in layout.slices
    ]
    return torch.cat(pieces) if pieces else torch.empty(0, device=device, dtype=torch.float32)


def signs_of_parameters(layout: Layout, seed: Tensor, side: int) -> Tensor:
    """+1 or -1 for each element that lies in a whole row of ``side``, as :func:`uniform_noise` draws: one
    parameter after the other. ``seed`` is an int64 on the device, which nothing waits for."""
    noise = [
        reference.uniform(param.numel // side * side, key, param.start, seed.device)
        for param, key in zip(layout.slices, keys_of_signs(layout, seed), strict=True)
    ]
    drawn = torch.cat(noise)
    return torch.where(drawn < 0.5, -torch.ones_like(drawn), 1.0)


def keys_of_signs(layout: Layout, seed: Tensor) -> Tensor:
    """What the signs of each parameter are drawn by: int64, ``[slices]``, on the device of ``seed``."""
    names = layout.remember((keys_of_signs, seed.device), lambda: _names_of_signs(layout).to(seed.device))
    return seed ^ names


def _names_of_signs(layout: Layout) -> Tensor:
    names = [_signed(name) for name in Key.of("signs").fold_each(layout.names)]
    return torch.tensor(names, dtype=torch.int64)


def _signed(bits: int) -> int:
    """The int64 with these 64 bits."""
    return bits - 2**64 if bits >= 2**63 else bits


def sign_bytes(numel: int) -> int:
    """Bytes of ``numel`` packed signs: one bit each."""
    return kernels.packed_bytes(numel, SIGNS, 1)


def pack_signs(x: Tensor, out: Tensor) -> Tensor:
    """``[x >= 0]``, one bit each, into ``out`` (uint8, ``[sign_bytes(numel)]``): sign(0) = +1.

    Returns the mean of ``|x|``, which is found in the same pass; 0 where there is nothing.
    """
    # The kernel has the mean of each block of 4096, the last one's over fewer; float64 adds up their sums.
    means = torch.empty(kernels.scale_count(x.numel(), SIGNS), device=x.device, dtype=torch.float32)
    kernels.quantize(x, out, means, block=SIGNS, bits=1)
    sums = means.double() * SIGNS
    sums[-1:] *= (x.numel() - (means.numel() - 1) * SIGNS) / SIGNS
    return sums.sum() / max(1, x.numel())


def unpack_signs(codes: Tensor, out: Tensor, scale: Tensor | float = 1.0, add: bool = False) -> None:
    """Write (or add) +scale and -scale into ``out`` (float32)."""
    scales = (
        torch.ones(kernels.scale_count(out.numel(), SIGNS), device=out.device, dtype=torch.float32) * scale
    )
    kernels.dequantize(codes, scales, out, block=SIGNS, bits=1, add=add)
