"""CNNpack's bodies in the container: what is read is what was packed, and hostile bytes are refused."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distcomp import DistcompError
from distcomp.blocks.dct import DctConv2d, dct_coefficients
from distcomp.cli import main
from distcomp.files import container
from distcomp.files.coding import CorruptFile
from distcomp.files.container import compress, decompress, sizes
from distcomp.files.dct_pack import LONGEST_SIDE, DctPack, is_kernel
from tests.structured.oracles import dct

FEW = settings(max_examples=20)


def kernels(seed: int = 0, *shape: int) -> torch.Tensor:
    smooth = torch.randn(shape or (24, 8, 5, 5), generator=torch.Generator().manual_seed(seed))
    return smooth.cumsum(-1).cumsum(-2) / 5


def by_hand(weight: np.ndarray, how: DctPack, centres: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The paper's steps, given the clusters: transform, take the common part off, shrink, round, and back."""
    rows, columns = dct(weight.shape[2]), dct(weight.shape[3])
    turned = np.einsum("ai,oqij,bj->oqab", rows, weight.astype(np.float64), columns).reshape(-1, rows.size)
    common = centres[members] if len(centres) else 0
    rest = turned - common
    shrunk = np.sign(rest) * np.maximum(np.abs(rest) - how.threshold * turned.std(), 0)
    step = np.abs(shrunk).max() / (how.levels // 2)
    whole = (np.round(shrunk / step) * step + common).reshape(weight.shape)
    return np.einsum("ai,oqab,bj->oqij", rows, whole, columns)


@pytest.mark.parametrize("how", [DctPack(0, 0.3, 16), DctPack(12, 0.2, 32), DctPack(16, 0.0, 256)])
def test_what_is_read_is_the_papers(how) -> None:
    from distcomp.files.dct_pack import packed

    weight = kernels()
    data = compress(
        {"conv.weight": weight, "fc.weight": torch.randn(30, 10), "steps": torch.tensor(3)}, 5, how
    )
    read = decompress(data)
    centres, members, _ = packed(weight.numpy(), how)
    np.testing.assert_allclose(
        read["conv.weight"].numpy(), by_hand(weight.numpy(), how, centres, members), atol=1e-5
    )
    assert int(read["steps"]) == 3
    assert "DCT" in sizes(data)[0].coding
    assert len(data) < 4 * (weight.numel() + 300)


def test_a_finer_pack_is_nearer_and_larger() -> None:
    weight = kernels()
    packs = [
        compress({"w": weight}, 5, DctPack(8, t, levels)) for t, levels in ((0.0, 512), (0.2, 64), (0.8, 8))
    ]
    errors = [float((decompress(data)["w"] - weight).norm() / weight.norm()) for data in packs]
    assert errors == sorted(errors)
    assert [len(data) for data in packs] == sorted((len(data) for data in packs), reverse=True)
    assert errors[0] < 0.01


def test_common_kernels_minimize_the_distance_to_their_members() -> None:
    from distcomp.files.dct_pack import common_kernels

    truth = np.random.default_rng(0).standard_normal((3, 9)) * 5
    which = np.arange(90) % 3
    turned = truth[which] + 0.01 * np.random.default_rng(1).standard_normal((90, 9))
    centres, members = common_kernels(turned, 3)
    assert len({tuple(members[which == k]) for k in range(3)}) == 3
    for k in range(3):
        np.testing.assert_allclose(centres[members[which == k][0]], turned[which == k].mean(0), atol=1e-5)


def test_files_without_frequencies_are_of_the_first_version() -> None:
    state = {"w": kernels()}
    assert struct.unpack_from("<H", compress(state), 4) == (1,)
    assert struct.unpack_from("<H", compress(state, 5, DctPack()), 4) == (2,)


@FEW
@given(st.data())
def test_damaged_bytes_are_refused_or_read_and_never_crash(data) -> None:
    whole = bytearray(compress({"w": kernels(0, 8, 4, 3, 3)}, 5, DctPack(4, 0.2, 16)))
    start = 20 + struct.unpack_from("<I", whole, 12)[0]
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(start, len(whole) - 1))] = data.draw(st.integers(0, 255))
    body = bytes(whole[start:])
    struct.pack_into("<I", whole, start - 4, zlib.crc32(body))  # a liar who knows about checksums
    struct.pack_into("<I", whole, 16, zlib.crc32(bytes(whole[20:start])))
    try:
        read = decompress(bytes(whole))
    except CorruptFile:
        return
    assert read["w"].shape == (8, 4, 3, 3)


def test_a_file_of_long_kernels_takes_no_memory_for_their_transform() -> None:
    """Of the square of their side: a file of bytes could ask for gigabytes."""
    (size,) = container.sizes(compress({"w": kernels(0, 2, 1, 1, 300)}, 5, DctPack()))
    assert not size.coding.startswith("DCT")
    assert not is_kernel((1, 1, 1, LONGEST_SIDE + 1))


def test_kernels_come_back_alike_however_many_are_read_at_once(monkeypatch) -> None:
    data = compress({"w": kernels()}, 5, DctPack(4, 0.2, 16))
    whole = decompress(data)["w"]
    monkeypatch.setattr(container, "AT_ONCE", 100)
    torch.testing.assert_close(decompress(data)["w"], whole, rtol=0, atol=1e-6)


def test_a_pack_that_cannot_be_is_refused() -> None:
    for wrong in ({"clusters": -1}, {"threshold": -0.1}, {"levels": 1}):
        with pytest.raises(DistcompError, match="a pack has 0 to 4096 clusters"):
            DctPack(**wrong)


def test_the_shell_packs_and_unpacks(tmp_path, capsys) -> None:
    torch.save({"conv.weight": kernels(), "conv.bias": torch.zeros(24)}, tmp_path / "model.pt")
    command = ["compress", str(tmp_path / "model.pt"), "-o", str(tmp_path / "model.dcz"), "--dct", "8,0.3,16"]
    assert main(command) == 0
    assert "DCT, 8 common kernels" in capsys.readouterr().out
    assert main(["decompress", str(tmp_path / "model.dcz"), "-o", str(tmp_path / "again.pt")]) == 0
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert torch.equal(again["conv.weight"], decompress((tmp_path / "model.dcz").read_bytes())["conv.weight"])
    command[-1] = "8,much"
    assert main(command) != 0
    assert "takes clusters, threshold and levels" in capsys.readouterr().err


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"padding": 2, "dilation": 2}])
def test_the_frequency_path_is_the_convolution(sparse, options) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 6, (3, 5), **options), torch.randn(2, 3, 12, 11)
    computed = DctConv2d(conv, dct_coefficients(conv.weight), sparse=sparse)(x)
    torch.testing.assert_close(computed, conv(x), atol=1e-5, rtol=1e-4)
