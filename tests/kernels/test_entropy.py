"""The coder: what it was given comes back, in about its entropy, and no stream leads outside a
buffer."""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.kernels import cpu, entropy

pytest.importorskip("distcomp.kernels._cpu", reason="the C extension was not built (no C compiler?)")
BLOCK = entropy.BLOCK


def kinds(numel: int, seed: int) -> dict[str, Tensor]:
    """Bytes of several kinds."""
    generator = torch.Generator().manual_seed(seed)
    normal = (torch.randn(numel, generator=generator) * 3).round().clamp(-100, 100) + 100
    rare = (torch.rand(numel, generator=generator) < 1e-3).float()
    return {
        "any": torch.randint(0, 256, (numel,), generator=generator).to(torch.uint8),
        "one": torch.full((numel,), 7, dtype=torch.uint8),
        "normal": normal.to(torch.uint8),
        "rare": rare.to(torch.uint8),
        "all alike": (torch.arange(numel) % 256).to(torch.uint8),
    }


def read_stream(stream: np.ndarray, numel: int) -> np.ndarray:
    """The decoder once more in plain Python, from the description at the head of _entropy.c."""
    blocks = -(-numel // BLOCK)
    lengths = stream[: 4 * blocks].view("<u4")
    at, out = 4 * blocks, []
    for block, length in enumerate(lengths.tolist()):
        n, data = min(BLOCK, numel - block * BLOCK), stream[at : at + (length >> 1)]
        at += length >> 1
        out.append(read_block(data, n) if length & 1 else data)
    assert at == len(stream)
    return np.concatenate([np.zeros(0, np.uint8), *out])


def read_block(data: np.ndarray, n: int) -> np.ndarray:
    tables, at, table_of = int(data[0]), 1, np.zeros(n, np.int64)
    assert tables in (1, 4)
    if tables == 4:
        thresholds, at = data[1:4], 4
        for begin in range(0, n, entropy.STRETCH):
            m, period = min(n - begin, entropy.STRETCH), int(data[at : at + 2].copy().view("<u2")[0])
            columns, at = read_levels(data, at + 2, period)
            rows, at = read_levels(data, at, -(-m // 128))
            levels = np.resize(columns, m) + np.repeat(rows, 128)[:m]
            table_of[begin : begin + m] = (levels[:, None] >= thresholds).sum(1)
    slots, bits = read_slots("".join(map(str, np.unpackbits(data[at:-128], bitorder="little"))), tables)
    words = data[at + -(-bits // 8) : -128].copy().view("<u2").tolist()
    return read_states(words, data[-128:].copy().view("<u4").tolist(), table_of, slots)


def read_levels(data: np.ndarray, at: int, count: int) -> tuple[np.ndarray, int]:
    """Levels of 3 bits, and where they end."""
    end = at + -(-count // 8) * 3
    bits = np.unpackbits(data[at:end], bitorder="little").reshape(-1, 3) @ [1, 2, 4]
    assert not bits[count:].any()
    return bits[:count], end


def read_slots(text: str, tables: int) -> tuple[list[list[tuple[int, int, int]]], int]:
    """Of each slot of each table its byte, how many slots that has, and which of them it is; and how many
    bits that took."""
    at, found = 0, []
    for _ in range(tables):
        shares = []
        for _ in range(256):
            zeros = text.index("1", at) - at
            rest = text[at + zeros + 1 : at + 2 * zeros + 1]
            shares.append((1 << zeros) + int("0" + rest[::-1], 2) - 1)
            at += 2 * zeros + 1
        assert sum(shares) == 2048
        found.append([(s, f, k) for s, f in enumerate(shares) for k in range(f)])
    return found, at


def read_states(
    words: list[int], states: list[int], table_of: np.ndarray, slots: list[list[tuple[int, int, int]]]
) -> np.ndarray:
    due, out = iter(words), []
    for i, table in enumerate(table_of.tolist()):
        x = states[i % 32]
        symbol, f, k = slots[table][x % 2048]
        x = f * (x // 2048) + k
        states[i % 32] = x if x >= 1 << 15 else x << 16 | next(due)
        out.append(symbol)
    assert list(due) == []
    assert states == [1 << 15] * 32
    return np.array(out, np.uint8)


def columns(numel: int, period: int = 48, seed: int = 5) -> Tensor:
    """Bytes of a matrix whose columns are of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(period, generator=generator) * 8
    normal = torch.randn(numel, generator=generator) * sizes.repeat(numel // period + 1)[:numel]
    return (normal.round().clamp(-100, 100) + 100).to(torch.uint8)


def test_columns_of_different_sizes_have_tables_of_their_own() -> None:
    numel = 5 * entropy.STRETCH + 5
    data = columns(numel)
    stream = entropy.encode(data, periods=(7, 48, 64, 5000))
    assert np.array_equal(read_stream(stream.numpy(), numel), data.numpy())
    assert torch.equal(entropy.decode(stream, numel), data)
    assert stream.numel() < 0.92 * entropy.encode(data).numel()
    # Rows that repeat otherwise, or not at all, cost nothing.
    assert entropy.encode(data, periods=(7, 64)).numel() < 1.001 * entropy.encode(data).numel()
    # Another matrix begins in the middle.
    both = torch.cat([columns(2 * entropy.STRETCH), columns(2 * entropy.STRETCH, 200, 6)])
    stream = entropy.encode(both, periods=(48, 200))
    assert torch.equal(entropy.decode(stream, both.numel()), both)
    assert stream.numel() < 0.99 * min(entropy.encode(both, periods=(one,)).numel() for one in (48, 200))


def test_rows_of_different_sizes_have_tables_of_their_own() -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.rand(512, 1, generator=generator) * 8
    data = ((torch.randn(512, 128, generator=generator) * sizes).round().clamp(-100, 100) + 100).byte()
    mixed = data.flatten()[torch.randperm(data.numel(), generator=generator)]
    assert entropy.encode(data.flatten()).numel() < 0.93 * entropy.encode(mixed).numel()


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 300, 5000, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
@pytest.mark.parametrize("coder", entropy.CODERS)
def test_what_was_coded_comes_back(numel: int, coder: str) -> None:
    if coder == "zstd":
        pytest.importorskip("zstandard", reason="zstandard is not installed (pip install 'distcomp[zstd]')")
    for data in kinds(numel, 1).values():
        stream = entropy.encode(data, coder)
        assert stream.numel() <= entropy.most_bytes(numel)
        assert torch.equal(entropy.decode(stream, numel, coder), data)


@settings(max_examples=20)
@given(numel=st.integers(0, 3000), seed=st.integers(0, 99), kind=st.sampled_from(list(kinds(1, 0))))
def test_streams_are_read_by_a_decoder_that_was_written_from_their_description(
    numel: int, seed: int, kind: str
) -> None:
    data = kinds(numel, seed)[kind]
    assert np.array_equal(read_stream(entropy.encode(data).numpy(), numel), data.numpy())


def test_a_stream_is_as_long_as_the_entropy_says() -> None:
    data = kinds(BLOCK, 2)["normal"]  # no columns: one table
    share = torch.bincount(data.int()).double() / BLOCK
    bound = BLOCK / 8 * float(-(share * share.clamp(min=1e-12).log2()).sum())
    assert bound < entropy.encode(data).numel() < 1.01 * bound + 300
    assert entropy.encode(kinds(BLOCK, 2)["one"]).numel() < 200
    assert entropy.encode(kinds(BLOCK, 2)["any"]).numel() == BLOCK + 4


def test_instruction_sets_change_no_byte() -> None:
    _cpu, usual = import_module("distcomp.kernels._cpu"), entropy._extension().instruction_set()
    streams = []
    try:
        for name in ("generic", usual):
            _cpu.use(name)
            given = (columns(BLOCK + 4099), *kinds(5000, 3).values(), columns(2500, 900))
            streams.append([entropy.encode(data, periods=(1, 48, 64, 900)) for data in given])
            for data, stream in zip(given, streams[0], strict=True):
                assert torch.equal(entropy.decode(stream, data.numel()), data)
    finally:
        _cpu.use(usual)
    assert all(torch.equal(generic, own) for generic, own in zip(*streams, strict=True))


def test_threads_change_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    data = columns(4 * BLOCK + 17)
    alone = entropy.encode(data, periods=(48,))
    monkeypatch.setattr(cpu, "ALONE_BYTES", 0)
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(entropy.encode(data, periods=(48,)), alone)
        assert torch.equal(entropy.decode(alone, data.numel()), data)
    finally:
        torch.set_num_threads(usual)


@pytest.mark.parametrize("numel", [500, 20_000])
def test_states_that_do_not_end_as_they_began_are_refused(numel: int) -> None:
    """Whatever byte of them is changed, and where words are left over or are missing."""
    stream = entropy.encode(columns(numel), periods=(48,))
    assert stream.numel() < numel
    for at in range(stream.numel() - 128, stream.numel(), 3):
        changed = stream.clone()
        changed[at] ^= 1
        with pytest.raises(DistcompError, match="one version and one coder"):
            entropy.decode(changed, numel)
    for due in (numel - 1, numel + 1, numel - 64, numel + 64):
        with pytest.raises(DistcompError, match="one version and one coder"):
            entropy.decode(stream, due)


@settings(max_examples=200)
@given(data=st.data(), numel=st.sampled_from([1, 100, 3000, 40_000]))
def test_hostile_streams_are_refused_or_decode_to_something(data: st.DataObject, numel: int) -> None:
    """Never more than is due, never outside: bytes changed, cut off, added."""
    stream = entropy.encode(columns(numel), periods=(48,)).clone()
    for _ in range(data.draw(st.integers(0, 4))):
        stream[data.draw(st.integers(0, min(3000, stream.numel() - 1)))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 8))
    stream = (
        stream[: max(0, stream.numel() - cut)]
        if data.draw(st.booleans())
        else torch.cat([stream, stream[:cut]])
    )
    with suppress(DistcompError):
        assert entropy.decode(stream.contiguous(), numel).numel() == numel


@settings(max_examples=50)
@given(stream=st.binary(max_size=200), numel=st.integers(0, 500))
@pytest.mark.parametrize("coder", entropy.CODERS)
def test_random_bytes_are_refused_or_decode_to_something(coder: str, stream: bytes, numel: int) -> None:
    if coder == "zstd":
        pytest.importorskip("zstandard", reason="zstandard is not installed (pip install 'distcomp[zstd]')")
    with suppress(DistcompError):
        decoded = entropy.decode(torch.tensor(list(stream), dtype=torch.uint8), numel, coder)
        assert decoded.numel() == numel


def test_a_coder_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DistcompError, match=r"distcomp\[zstd\]"):
        entropy.encode(torch.zeros(10, dtype=torch.uint8), "zstd")
    assert math.isfinite(entropy.most_bytes(0))
