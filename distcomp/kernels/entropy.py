"""A lossless stage for the bytes of a payload: fewer where some bytes are more frequent than others.

``ans`` is the coder in ``_entropy.c`` (Duda, "Asymmetric numeral systems", 2013): frequent bytes take a
fraction of a bit, 32 states are decoded side by side, and there are up to four tables for each 512 KiB,
between which the columns of a matrix and stretches of its rows are divided by the size of their gradients.
Repetitions are not looked for, for packed codes have none.
``zstd`` is Zstandard at its fastest level, an extra. Either way a stream is at most :func:`most_bytes` long.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.kernels.tables import check_tensor

BLOCK = 1 << 19
"""Bytes that share tables."""
STRETCH = 1 << 14
"""Bytes whose columns are of one period."""
LONGEST_PERIOD = 1024
CODERS = ("ans", "zstd")
LEVEL = 1
"""Of zstd: what higher levels search for, repetitions, packed codes do not have."""


def most_bytes(numel: int) -> int:
    """How long a stream of so many bytes may be: a block that does not become shorter stays as it is."""
    return numel + 4 * -(-numel // BLOCK) + 1


def encode(data: Tensor, coder: str = "ans", periods: Sequence[int] = ()) -> Tensor:
    """The stream (uint8, on the CPU) of ``data`` (uint8, 1-D, contiguous, on the CPU).

    ``periods``: after how many bytes the rows of what was packed may repeat; ``ans`` finds out which of
    them pays, stretch by stretch, and leaves out those above :data:`LONGEST_PERIOD`.

    Raises DistcompError for a coder that is not installed.
    """
    check_tensor("bytes", data, torch.uint8, 0)
    if coder == "zstd":
        return _zstd_encode(data)
    extension = _extension()
    blocks = -(-data.numel() // BLOCK)
    out = torch.empty(data.numel(), dtype=torch.uint8)
    lengths = torch.empty(blocks, dtype=torch.int32)
    rows = torch.tensor(list(periods), dtype=torch.int64)
    at = data.data_ptr(), out.data_ptr(), lengths.data_ptr(), rows.data_ptr()
    sizes = data.numel(), out.numel(), blocks, rows.numel()
    _shared(lambda first, count: extension.entropy_encode(*at, sizes, first, count), blocks)
    ends = [min(data.numel(), (block + 1) * BLOCK) for block in range(blocks)]
    coded = [out[end - (length >> 1) : end] for end, length in zip(ends, lengths.tolist(), strict=True)]
    return torch.cat([lengths.view(torch.uint8), *coded])


def decode(coded: Tensor, numel: int, coder: str = "ans") -> Tensor:
    """The ``numel`` bytes (uint8, on the CPU) that :func:`encode` was given.

    Raises DistcompError for a stream that is not of so many bytes; never reads or writes beyond a buffer.
    """
    check_tensor("stream", coded, torch.uint8, 0)
    if coder == "zstd":
        return _zstd_decode(coded, numel)
    extension = _extension()
    out = torch.empty(numel, dtype=torch.uint8)
    at, sizes = (coded.data_ptr(), out.data_ptr()), (coded.numel(), numel)
    good = _shared(
        lambda first, count: extension.entropy_decode(*at, sizes, first, count), -(-numel // BLOCK)
    )
    if not all(good) or (numel == 0 and coded.numel()):
        raise _unreadable(coded, numel)
    return out


def _unreadable(coded: Tensor, numel: int) -> DistcompError:
    return DistcompError(
        f"{coded.numel()} coded bytes do not decode to {numel}; ranks understand each other with one "
        "version and one coder only: attach all of them alike"
    )


def _extension() -> Any:
    try:
        return import_module("distcomp.kernels._cpu")
    except ImportError as error:
        raise DistcompError(
            f"the coder ans is part of the C kernels, which are not available ({error}); build them, or "
            "take zstd"
        ) from error


def _shared(run: Any, blocks: int) -> list[Any]:
    """``run(first, count)``, shared between threads."""
    from distcomp.kernels import cpu

    return cpu.shared(run, blocks, 1, BLOCK) if blocks else []


def _zstandard() -> Any:
    try:
        return import_module("zstandard")
    except ImportError as error:
        raise DistcompError(
            "the coder zstd needs the package zstandard; pip install 'distcomp[zstd]', or take ans"
        ) from error


def _zstd_encode(data: Tensor) -> Tensor:
    """A byte that says whether it is coded, then the frame or the bytes."""
    plain = data.numpy().tobytes()
    frame = (
        _zstandard()
        .ZstdCompressor(level=LEVEL, write_content_size=False, write_checksum=False)
        .compress(plain)
    )
    body = b"\1" + frame if len(frame) < len(plain) else b"\0" + plain
    return torch.frombuffer(bytearray(body), dtype=torch.uint8)


def _zstd_decode(coded: Tensor, numel: int) -> Tensor:
    zstandard = _zstandard()
    stream = coded.numpy().tobytes()
    try:
        # At most the bytes that are due: a frame that says otherwise is refused before they are made.
        body = (
            zstandard.ZstdDecompressor().decompress(stream[1:], max_output_size=max(1, numel))
            if stream[:1] == b"\1"
            else stream[1:]
        )
    except zstandard.ZstdError:
        raise _unreadable(coded, numel) from None
    if len(body) != numel or stream[:1] not in (b"\0", b"\1"):
        raise _unreadable(coded, numel)
    return (
        torch.frombuffer(bytearray(body), dtype=torch.uint8) if numel else torch.empty(0, dtype=torch.uint8)
    )
