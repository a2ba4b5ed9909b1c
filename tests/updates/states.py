"""State dicts for tests, bit patterns of any kind among them."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = [
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip
SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (37,), (12, 31), (3, 1, 50)]


def bits_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bit patterns: NaNs, infinities, subnormals and both zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(
        0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8, generator=generator
    )
    return raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def stepped(tensor: Tensor, share: float, seed: int, furthest: int = 1) -> Tensor:
    """A copy of which a share of the words moved by up to ``furthest`` units, up or down."""
    generator = torch.Generator().manual_seed(seed)
    if not tensor.numel() or tensor.dtype == torch.bool:
        return tensor.clone()
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    words = real.clone().reshape(-1).view(signed[real.element_size()])
    moved = torch.rand(words.shape, generator=generator) < share
    far = torch.randint(1, furthest + 1, words.shape, generator=generator)
    up = torch.randint(0, 2, words.shape, generator=generator) * 2 - 1
    words += (moved * far * up).to(words.dtype)
    new = words.view(real.dtype).reshape(real.shape)
    return torch.view_as_complex(new) if tensor.is_complex() else new


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(raw(one[name]) == raw(other[name]) for name in one)


def raw(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def words(tensor: Tensor) -> list[int]:
    """Unsigned, for the oracle."""
    halves = 2 if tensor.is_complex() else 1
    size = tensor.element_size() // halves
    data = raw(tensor)
    return [int.from_bytes(data[at : at + size], "little") for at in range(0, len(data), size)]
