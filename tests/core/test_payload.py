"""Bytes on the wire: their order, their seal, and every way to spoil them."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distcomp.errors import CorruptPayload
from distcomp.payload import (
    HEADER,
    Part,
    Parts,
    Payload,
    PayloadHeader,
    body_bytes,
    check_header,
    wire_bytes,
    write_header,
)

PARTS = (Part("scales", torch.float32, 3), Part("codes", torch.uint8, 5))
AGREED = PayloadHeader(rank=2, fingerprint=0xDEADBEEF, exchange=41)
TRUE, FALSE = torch.tensor(True), torch.tensor(False)

kinds = st.sampled_from([torch.int64, torch.float32, torch.int32, torch.bfloat16, torch.int16, torch.uint8])
words = st.integers(0, 2**32 - 1)
parts_lists = st.lists(st.tuples(kinds, st.integers(0, 9)), max_size=5).map(
    lambda drawn: tuple(
        Part(f"part{index}", dtype, numel)
        for index, (dtype, numel) in enumerate(sorted(drawn, key=lambda d: -d[0].itemsize))
    )
)


def sealed(finite: torch.Tensor = TRUE) -> Payload:
    payload = Payload.empty(PARTS)
    payload["scales"].copy_(torch.tensor([1.0, 2.0, 3.0]))
    payload["codes"].copy_(torch.tensor([1, 2, 3, 4, 5]))
    write_header(payload, AGREED, finite)
    return payload


@given(parts_lists)
def test_parts_lie_one_behind_the_other_and_the_whole_is_a_multiple_of_eight(parts: Parts) -> None:
    payload = Payload.empty(parts)
    payload.wire.zero_()
    assert payload.wire.numel() == wire_bytes(parts)
    assert wire_bytes(parts) % 8 == 0
    assert 0 <= wire_bytes(parts) - HEADER.size - body_bytes(parts) < 8
    at = HEADER.size
    for part in parts:
        view = payload[part.kind]
        assert (view.dtype, view.numel()) == (part.dtype, part.numel)
        if part.numel:
            assert view.data_ptr() - payload.wire.data_ptr() == at
        at += part.nbytes
    assert payload.body.numel() == body_bytes(parts)


def test_parts_that_would_not_be_aligned_are_refused() -> None:
    with pytest.raises(ValueError, match="falling item size"):
        Payload.empty((Part("codes", torch.uint8, 3), Part("scales", torch.float32, 1)))


def test_the_header_is_the_one_in_the_docstring() -> None:
    wire = sealed().wire.numpy().tobytes()
    assert HEADER.size == 32
    magic, bad, good, rank, fingerprint, exchange, length, _ = struct.unpack("<4sBBHIIQQ", wire[:32])
    assert (magic, bad, good) == (b"dcp1", 0, 1)
    assert (rank, fingerprint, exchange, length) == (2, 0xDEADBEEF, 41, 17)
    assert wire[32:49] == struct.pack("<3f", 1, 2, 3) + bytes([1, 2, 3, 4, 5])


@pytest.mark.parametrize("finite", [True, False])
def test_what_was_sealed_opens_and_tells_whether_it_was_finite(finite: bool) -> None:
    assert bool(check_header(sealed(torch.tensor(finite)), AGREED)) is finite


@pytest.mark.parametrize(
    ("at", "what"),
    [
        (0, "magic"),
        (3, "magic"),
        (4, "finite flag"),
        (5, "finite flag"),
        (6, "rank"),
        (7, "rank"),
        (8, "settings fingerprint"),
        (12, "exchange number"),
        (16, "length"),
        (23, "length"),
        (24, "checksum"),
        (31, "checksum"),
        (32, "checksum"),
        (48, "checksum"),
    ],
)
def test_a_spoilt_byte_is_an_error_that_names_what_is_wrong_and_who_sent_it(at: int, what: str) -> None:
    for bit in range(8):
        for finite in (TRUE, FALSE):
            payload = sealed(finite)
            payload.wire[at] ^= 1 << bit
            with pytest.raises(CorruptPayload, match=rf"from rank 2 in exchange 41 is corrupt: {what} is"):
                check_header(payload, AGREED)


@given(st.integers(0, 32 + 17 - 1), st.integers(1, 255))
def test_any_change_of_any_byte_is_found(at: int, change: int) -> None:
    payload = sealed()
    payload.wire[at] ^= change
    with pytest.raises(CorruptPayload):
        check_header(payload, AGREED)


@given(st.integers(0, 3), st.integers(0, 3))
def test_two_words_that_changed_places_are_found(one: int, other: int) -> None:
    payload = sealed()
    words = payload.wire[32:48].view(torch.int32)
    if words[one] == words[other]:
        return
    words[[one, other]] = words[[other, one]]
    with pytest.raises(CorruptPayload, match="checksum"):
        check_header(payload, AGREED)


@pytest.mark.parametrize(
    ("expected", "what"),
    [
        (PayloadHeader(1, 0xDEADBEEF, 41), "rank is 2, expected 1"),
        (PayloadHeader(2, 0xDEADBEE0, 41), "settings fingerprint"),
        (PayloadHeader(2, 0xDEADBEEF, 42), "exchange number is 41, expected 42"),
    ],
)
def test_a_sound_payload_of_another_exchange_is_refused(expected: PayloadHeader, what: str) -> None:
    with pytest.raises(CorruptPayload, match=what):
        check_header(sealed(), expected)


def test_a_payload_of_other_parts_is_refused() -> None:
    longer = Payload.empty((Part("scales", torch.float32, 4), Part("codes", torch.uint8, 5)))
    longer.wire.zero_()
    longer.wire[: sealed().wire.numel()] = sealed().wire
    with pytest.raises(CorruptPayload, match="length is 17, expected 21"):
        check_header(longer, AGREED)


def test_the_message_says_what_to_do() -> None:
    payload = sealed()
    payload.wire[40] ^= 1
    with pytest.raises(CorruptPayload, match="no gradient was changed: restart from the last checkpoint"):
        check_header(payload, AGREED)


@given(parts_lists, st.booleans(), st.integers(0, 2**16 - 1), words, words)
def test_c_and_python_write_and_read_the_same_header(
    parts: Parts, finite: bool, rank: int, fingerprint: int, exchange: int
) -> None:
    pytest.importorskip("distcomp.kernels._cpu")
    agreed = PayloadHeader(rank, fingerprint, exchange)
    by_c, by_python = Payload.empty(parts), Payload.empty(parts)
    by_c.wire.copy_(torch.arange(by_c.wire.numel()) % 251)
    by_python.wire.copy_(by_c.wire)
    write_header(by_c, agreed, torch.tensor(finite))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distcomp.kernels.dispatch.forced", lambda: "reference")
        write_header(by_python, agreed, torch.tensor(finite))
        assert bool(check_header(by_c, agreed)) is finite
    assert torch.equal(by_c.wire, by_python.wire)
    assert bool(check_header(by_python, agreed)) is finite
    for other in (agreed._replace(rank=rank ^ 1), agreed._replace(exchange=exchange ^ 1)):
        with pytest.raises(CorruptPayload):
            check_header(by_c, other)
