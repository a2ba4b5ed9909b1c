"""Deep Compression: codes against their definitions, files that read back bit for bit or are refused."""

from __future__ import annotations

import io
import itertools
import json
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distcomp import pruning
from distcomp.cli import main
from distcomp.files import coding
from distcomp.files.container import _gaps, _places
from distcomp.files.k_means import k_means, nearest
from tests.pruning import fuzz

SYMBOLS = st.integers(2, 300).flatmap(
    lambda alphabet: st.tuples(st.just(alphabet), st.lists(st.integers(0, alphabet - 1), max_size=200))
)


@given(SYMBOLS, st.sampled_from([coding.PACKED, coding.HUFFMAN, coding.ZLIB]))
def test_every_coder_gives_back_what_it_got(given_, coder):
    alphabet, values = given_
    symbols = np.array(values, np.int64)
    encoders = {
        coding.PACKED: lambda: coding._pack(symbols, coding.width(alphabet)),
        coding.HUFFMAN: lambda: coding._huffman(symbols, alphabet),
        coding.ZLIB: lambda: coding.zlib.compress(
            symbols.astype("u1" if alphabet <= 256 else "<u2").tobytes()
        ),
    }
    np.testing.assert_array_equal(coding.decode(coder, encoders[coder](), len(symbols), alphabet), symbols)


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=64))
def test_huffman_is_a_prefix_code_near_the_entropy(counts):
    counts = np.array(counts, np.int64)
    lengths = coding.code_lengths(counts)
    assert ((lengths > 0) == (counts > 0)).all()
    if np.count_nonzero(counts) < 2:
        return
    assert sum(2.0 ** -int(n) for n in lengths if n) == 1
    p = counts[counts > 0] / counts.sum()
    mean = (lengths * counts).sum() / counts.sum()
    assert -(p * np.log2(p)).sum() - 1e-9 <= mean < -(p * np.log2(p)).sum() + 1.01
    codes = coding.canonical_codes(lengths)
    words = sorted(format(int(c), f"0{n}b") for c, n in zip(codes, lengths, strict=True) if n)
    assert all(not after.startswith(word) for word, after in itertools.pairwise(words))


def test_a_skewed_code_stays_within_fifteen_bits():
    counts = np.array([int(1.7**k) + 1 for k in range(60)])
    assert coding.code_lengths(counts).max() == coding.LONGEST


@given(st.lists(st.booleans(), min_size=1, max_size=400), st.integers(1, 8))
def test_gaps_say_where_weights_live(alive, bits):
    places = np.flatnonzero(alive)
    symbols = _gaps(places, bits)
    assert (symbols < 1 << bits).all()
    np.testing.assert_array_equal(_places(symbols, bits)[0], places)


def test_k_means_is_lloyds_from_equal_steps():
    values = np.random.default_rng(0).normal(size=400).astype(np.float32)
    centroids = np.linspace(values.min(), values.max(), 8)
    for _ in range(200):
        member = np.abs(values[:, None] - centroids).argmin(1)
        centroids = np.array([values[member == k].mean() for k in range(8)])
    np.testing.assert_allclose(k_means(values, 8), centroids, atol=2e-2)
    found = k_means(values, 8)
    own = np.array([values[nearest(values, found) == k].mean() for k in range(8)])
    np.testing.assert_allclose(own, found, atol=1e-5)


def test_k_means_goes_on_until_no_centroid_moves():
    """Fifty rounds are not enough for many values."""
    values = np.random.default_rng(0).normal(size=20_000).astype(np.float32)
    centroids = np.linspace(values.min(), values.max(), 32)
    for _ in range(50):
        member = nearest(values, centroids)
        counts = np.bincount(member, minlength=32)
        means = np.bincount(member, values, minlength=32) / np.maximum(counts, 1)
        centroids = np.where(counts > 0, means, centroids)
    found = k_means(values, 32)
    member = nearest(values, found)
    np.testing.assert_allclose(np.bincount(member, values) / np.bincount(member), found, atol=1e-6)

    def error(centroids):
        return np.square(values - centroids[nearest(values, centroids)]).mean()

    assert error(found) < 0.75 * error(centroids)


def sparse_state():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(300, 128, generator=generator)
    weight[torch.rand(300, 128, generator=generator) < 0.92] = 0
    return {"fc.weight": weight, "fc.bias": torch.randn(300, generator=generator), "n": torch.tensor(7)}


def test_a_file_reads_back_bit_for_bit():
    state = sparse_state()
    data = pruning.compress(state, 5)
    decoded = pruning.decompress(data)
    assert torch.equal(decoded["fc.weight"] != 0, state["fc.weight"] != 0)
    assert decoded["fc.weight"].unique().numel() <= 33
    again = pruning.decompress(pruning.compress(decoded, 5))
    for name, tensor in decoded.items():
        assert again[name].dtype == tensor.dtype == state[name].dtype
        assert torch.equal(again[name], tensor)
    assert pruning.compress(decoded, 5) == data
    dense = 4 * 300 * 128 + 4 * 300 + 8
    assert dense / len(data) > 25
    assert sum(size.stored_bytes for size in pruning.sizes(data)) + 20 == len(data)


@given(st.sampled_from([torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.float32]), st.data())
def test_other_types_and_odd_shapes_are_exact(dtype, data):
    shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=4)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    tensor = (3 * torch.randn(shape, generator=generator)).round().to(dtype)
    decoded = pruning.decompress(pruning.compress({"": tensor, "ä": tensor}))
    assert list(decoded) == ["", "ä"]
    assert all(torch.equal(one, tensor) and one.dtype == dtype for one in decoded.values())


EDITS = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6)


@settings(max_examples=300)
@given(st.integers(0, 2), EDITS, st.integers(0, 50), st.booleans())
def test_a_hostile_file_is_read_or_refused(which, edits, cut, mend):
    fuzz.try_to_read(fuzz.mutated(which, edits, cut, mend))


@settings(max_examples=100)
@given(st.binary(max_size=300))
def test_noise_is_refused(data):
    assert fuzz.try_to_read(data) == "refused"
    fuzz.try_to_read(b"dcz1\x01\x00\x00\x00" + data)


def test_without_mended_checksums_every_changed_byte_is_noticed():
    good = fuzz.seeds()[0]
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 0x11
        assert fuzz.try_to_read(bytes(bad)) == "refused"


def test_a_bomb_is_refused_before_it_takes_memory():
    data = pruning.compress({"w": torch.zeros(1 << 22)})
    assert len(data) < 1 << 14
    tracemalloc.start()
    with pytest.raises(pruning.CorruptFile.__base__, match="more than the 1000 allowed"):
        pruning.decompress(data, limit_bytes=1000)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def one_float(stream: tuple[int, bytes]) -> bytes:
    """A file of one float32 whose gaps are coded by ``stream``."""
    codes = coding.encode(np.array([0]), 1)
    body = struct.pack("<BHII", 1, 1, 1, 1) + struct.pack("<f", 1.0)
    body += b"".join(struct.pack("<BI", coder, len(data)) + data for coder, data in (stream, codes))
    line = struct.pack("<H", 1) + b"w" + struct.pack("<BBI", 0, 1, 1)
    line += struct.pack("<BII", 1, len(body), zlib.crc32(body))
    return fuzz.HEADER.pack(b"dcz1", 1, 0, 1, len(line), zlib.crc32(line)) + line + body


STREAM_BYTES = 1 << 20
LONG_STREAMS = {
    "huffman": (coding.HUFFMAN, bytes([0x11]) + bytes(STREAM_BYTES)),
    "packed": (coding.PACKED, bytes(STREAM_BYTES)),
    "zlib": (coding.ZLIB, zlib.compress(bytes(STREAM_BYTES << 5))),
}


def peak_bytes(action):
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("stream", LONG_STREAMS.values(), ids=LONG_STREAMS)
def test_a_stream_that_is_longer_than_its_count_is_not_expanded(stream):
    data = one_float(stream)

    def refused():
        with pytest.raises(pruning.CorruptFile):
            pruning.decompress(data, limit_bytes=1 << 12)
        with pytest.raises(pruning.CorruptFile):
            coding.decode(*stream, 1, 2)

    assert peak_bytes(refused) < 4 * STREAM_BYTES


@pytest.mark.parametrize("coder", coding.CODERS)
def test_expanding_takes_little_more_than_the_symbols(coder):
    rng = np.random.default_rng(0)
    count, alphabet = 3 * coding.AT_ONCE + 5, 300
    symbols = np.minimum(rng.geometric(0.02, count), alphabet - 1)
    encoded = {
        coding.PACKED: lambda: coding._pack(symbols, coding.width(alphabet)),
        coding.HUFFMAN: lambda: coding._huffman(symbols, alphabet),
        coding.ZLIB: lambda: zlib.compress(symbols.astype("<u2").tobytes()),
    }[coder]()
    np.testing.assert_array_equal(coding.decode(coder, encoded, count, alphabet), symbols)
    assert coding.decode(coder, encoded, count, alphabet).dtype == np.uint16


def test_a_large_tensor_comes_back_and_takes_at_most_twice_its_bytes():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1 << 19, generator=generator).round(decimals=0)
    data = pruning.compress({"w": weight}, bits=5)
    decoded = {}
    nbytes = 4 * weight.numel()
    peak = peak_bytes(lambda: decoded.update(pruning.decompress(data, 2 * nbytes)))
    assert torch.equal(decoded["w"], weight)
    assert peak < 2 * nbytes + (12 << 20)


def test_an_endless_file_is_read_no_further_than_the_limit_allows(tmp_path, capsys):
    class Endless(io.RawIOBase):
        given = 0

        def __init__(self, front: bytes) -> None:
            self.front = front

        def read(self, count: int = -1) -> bytes:
            assert count >= 0, "all of it was asked for"
            self.given += count
            taken, self.front = self.front[:count], self.front[count:]
            return taken.ljust(count, b"\0")

    for header in (
        b"",
        fuzz.HEADER.pack(b"dcz1", 1, 0, 1, 0xFFFFFFF, 0),
        fuzz.HEADER.pack(b"dcz1", 1, 0, 9**9, 9, 0),
    ):
        endless = Endless(header)
        with pytest.raises(pruning.CorruptFile.__base__):
            pruning.decompress(endless, limit_bytes=1 << 16)
        assert endless.given <= 1 << 16
    assert main(["decompress", "/dev/zero", "--limit", "10", "-o", str(tmp_path / "out")]) == 2
    assert "no .dcz file" in capsys.readouterr().err


def test_centroids_are_trained_by_the_sum_of_their_members_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20))
    mask = torch.rand(20, 30) < 0.5
    pruning.fixed(model, {"0.weight": mask})
    pruning.share(model, bits=2)
    weight = model[0].weight.detach().clone()
    assert torch.equal(weight != 0, mask)
    assert weight.unique().numel() == 5
    x = torch.randn(8, 30)
    model(x).square().sum().backward()
    dense = nn.Linear(30, 20)
    dense.load_state_dict({"weight": weight, "bias": model[0].bias.detach()})
    dense(x).square().sum().backward()
    chain = model[0].parametrizations.weight
    for index, value in enumerate(chain.original.tolist()):
        members = weight == value
        torch.testing.assert_close(chain.original.grad[index], dense.weight.grad[members].sum())
    state = pruning.plain_state(model)
    assert list(state) == ["0.bias", "0.weight"]
    assert torch.equal(pruning.decompress(pruning.compress(state, 2))["0.weight"], weight)


def test_compress_and_decompress_from_the_shell(tmp_path, capsys):
    model, packed, back = tmp_path / "model.pt", tmp_path / "model.dcz", tmp_path / "back.pt"
    torch.save(sparse_state(), model)
    assert main(["compress", str(model), "-o", str(packed)]) == 0
    assert "x smaller" in capsys.readouterr().out
    assert main(["compress", str(model), "-o", str(packed), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == packed.stat().st_size
    assert {one["name"] for one in told["tensors"]} == sparse_state().keys()
    assert main(["decompress", str(packed), "-o", str(back)]) == 0
    decoded = torch.load(back, weights_only=True)
    assert all(
        torch.equal(decoded[name], one) for name, one in pruning.decompress(packed.read_bytes()).items()
    )


def test_mistakes_in_the_shell_are_one_sentence_and_leave_no_file(tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "text").write_text("no model")
    torch.save(nn.Linear(2, 2), tmp_path / "object.pt")
    torch.save({"parametrizations.weight.original": torch.ones(2)}, tmp_path / "masked.pt")
    packed = pruning.compress(sparse_state())
    (tmp_path / "cut.dcz").write_bytes(packed[:-5])
    (tmp_path / "whole.dcz").write_bytes(packed)
    for command in (
        ["compress", "text"], ["compress", "absent.pt"], ["compress", "object.pt"], ["compress", "masked.pt"],
        ["decompress", "text"], ["decompress", "cut.dcz"], ["decompress", "whole.dcz", "--limit", "10"],
    ):  # fmt: skip
        assert main([command[0], str(tmp_path / command[1]), *command[2:], "-o", str(out)]) == 2
        told = capsys.readouterr().err
        assert told.startswith("distcomp: ")
        assert len(told.splitlines()) == 1
        assert not out.exists()
