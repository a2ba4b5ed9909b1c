"""Bytes as they cross the wire: a header of 32 bytes and named parts, in one buffer.

========  =====  ==============================================================
offset    bytes  what
========  =====  ==============================================================
0         4      magic ``dcp1``
4         1      1 if the sender's tensor held a NaN or an infinity, 0 if not
5         1      1 minus that: the checksum does not cover it
6         2      rank of the sender
8         4      fingerprint of the settings both sides were attached with
12        4      number of the exchange
16        8      length of what follows the header
24        8      checksum of what follows the header (:func:`distcomp.kernels.checksum`)
========  =====  ==============================================================

The parts lie behind it in order of falling item size, so that each is aligned without padding. Nothing in a
payload is ever unpickled; the receiver knows every length before a byte arrives and refuses anything else.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from distcomp.errors import CorruptPayload
from distcomp.kernels import checksum
from distcomp.kernels.dispatch import served_by_c

HEADER = struct.Struct("<4sBBHIIQQ")
"""Little-endian, without padding: the table above."""
MAGIC = b"dcp1"
"""What every payload begins with."""
NON_FINITE_AT = 4
"""Where the flag stands whether the sender's tensor was *not* finite."""
FINITE_AT = 5
"""Where its opposite stands: a bit that flips on the way makes both alike, which is no legal header."""
CHECKED = (
    "magic", "finite flag", "finite flag", "rank", "settings fingerprint", "exchange number", "length",
    "checksum",
)  # fmt: skip
"""What each field of the header is called where it is not the expected one."""
SEALED_ALONE_BYTES = 1 << 20
"""Threads share the checksum of more."""
FINITE, NON_FINITE = torch.tensor(True, dtype=torch.bool), torch.tensor(False, dtype=torch.bool)
"""What a header on the CPU says; never written to."""


class Part(NamedTuple):
    """One tensor of a payload: its kind for the ledger (codes, scales, indices, values), dtype and length."""

    kind: str
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.numel * self.dtype.itemsize


Parts = tuple[Part, ...]
"""What a payload holds, in order of falling item size."""


@lru_cache(maxsize=4096)
def body_bytes(parts: Parts) -> int:
    """Bytes of all parts: what follows the header, without padding."""
    return sum(part.nbytes for part in parts)


@lru_cache(maxsize=4096)
def wire_bytes(parts: Parts) -> int:
    """What a payload of these parts weighs on the wire: header, parts, and padding to a multiple of 8 bytes.

    The padding keeps payloads aligned that arrive one behind another in one buffer.
    """
    return -(-(HEADER.size + body_bytes(parts)) // 8) * 8


@lru_cache(maxsize=4096)
def _places(parts: Parts) -> tuple[dict[str, tuple[int, int, torch.dtype]], int]:
    """Where each kind begins and ends in the buffer, and its dtype; and where all of them end."""
    sizes = [part.dtype.itemsize for part in parts]
    if sizes != sorted(sizes, reverse=True):
        raise ValueError(f"parts must come in order of falling item size, to be aligned: {parts}")
    places, at = {}, HEADER.size
    for part in parts:
        places[part.kind] = at, at + part.nbytes, part.dtype
        at += part.nbytes
    return places, at


class Payload:
    """A buffer ``wire`` (uint8) and the views of its parts.

    >>> payload = Payload.empty((Part("scales", torch.float32, 1), Part("codes", torch.uint8, 4)))
    >>> payload.wire.numel(), payload["codes"].numel()
    (40, 4)
    """

    def __init__(self, wire: Tensor, parts: Parts) -> None:
        self.wire = wire
        self.parts = parts
        self._places, self._end = _places(parts)

    @staticmethod
    def empty(parts: Parts, device: torch.device | None = None) -> Payload:
        """One whose parts are still to be written, and whose header is, when it is sent."""
        return Payload(torch.empty(wire_bytes(parts), dtype=torch.uint8, device=device), parts)

    def __getitem__(self, kind: str) -> Tensor:
        start, stop, dtype = self._places[kind]
        return self.wire[start:stop].view(dtype)

    @property
    def body(self) -> Tensor:
        """What follows the header (uint8), without padding: what the checksum covers."""
        return self.wire[HEADER.size : self._end]

    @property
    def body_bytes(self) -> int:
        """How long that is."""
        return self._end - HEADER.size

    @property
    def is_whole(self) -> bool:
        """Whether the buffer is as long as the parts say, and in one piece."""
        return self.wire.numel() >= self._end and self.wire.is_contiguous()


class PayloadHeader(NamedTuple):
    """What both sides agree on about one exchange."""

    rank: int
    fingerprint: int
    exchange: int


def write_header(payload: Payload, agreed: PayloadHeader, finite: Tensor) -> None:
    """Write the header. ``finite`` (a bool of no dimensions) lies on the payload's device."""
    if _sealed_by_c(payload):
        from distcomp.kernels import _cpu

        _cpu.write_header(payload.wire.data_ptr(), payload.body_bytes, *agreed, bool(finite))
        return
    if payload.wire.is_cpu:
        fields = _header(agreed, bool(finite), payload, checksum(payload.body))
        HEADER.pack_into(payload.wire.numpy().data, 0, *fields)
        return
    # The checksum would have to come to the host before it can be written: there is none.
    header = HEADER.pack(*_header(agreed, True, payload, 0))
    payload.wire[: HEADER.size] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    # On the payload's device, after the rest: the flag is the only part that the host may not know yet.
    payload.wire[NON_FINITE_AT] = ~finite
    payload.wire[FINITE_AT] = finite


def check_header(payload: Payload, expected: PayloadHeader) -> Tensor:
    """Check the header against what was agreed; return whether the sender's tensor was finite.

    Raises :class:`CorruptPayload` naming the first check that fails. On a GPU nothing waits for the device: a
    header that is not the expected one makes the answer count as non-finite, and there is no checksum.
    """
    if not payload.wire.is_cpu:
        return _unseal_on_device(payload, expected)
    if _sealed_by_c(payload):
        from distcomp.kernels import _cpu

        told = _cpu.read_header(payload.wire.data_ptr(), payload.body_bytes, *expected)
        if told is not None:
            return FINITE if told else NON_FINITE
    got = HEADER.unpack_from(payload.wire.numpy().data)
    finite = bool(got[2])
    wanted = _header(expected, finite, payload, checksum(payload.body))
    if got == wanted:
        return FINITE if finite else NON_FINITE
    what, is_there, was_due = next(
        (what, *both) for what, *both in zip(CHECKED, got, wanted, strict=True) if both[0] != both[1]
    )
    raise CorruptPayload(
        f"the payload from rank {expected.rank} in exchange {expected.exchange} is corrupt: {what} is "
        f"{is_there!r}, expected {was_due!r}; no gradient was changed: restart from the last checkpoint and "
        "check the network"
    )


def _sealed_by_c(payload: Payload) -> bool:
    """Whether one call of C does all: of what is whole, and no work for several threads."""
    return payload.body_bytes <= SEALED_ALONE_BYTES and payload.is_whole and served_by_c(payload.wire)


def _header(agreed: PayloadHeader, finite: bool, payload: Payload, check: int) -> tuple[bytes | int, ...]:
    """Its fields, in order."""
    about = agreed.rank, agreed.fingerprint, agreed.exchange
    return MAGIC, int(not finite), int(finite), *about, payload.body_bytes, check


def _unseal_on_device(payload: Payload, expected: PayloadHeader) -> Tensor:
    header = HEADER.pack(*_header(expected, True, payload, 0))
    wanted = torch.frombuffer(bytearray(header), dtype=torch.uint8).to(payload.wire.device, non_blocking=True)
    return (payload.wire[: HEADER.size] == wanted).all()
