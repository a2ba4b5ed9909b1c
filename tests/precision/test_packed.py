"""Packed binary layers: the kernel against NumPy, the model against the one it was made from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distcomp import kernels, precision
from distcomp.errors import DistcompError
from distcomp.kernels import dispatch
from distcomp.kernels.binary import binary_conv2d, binary_linear, pack_filters, unpack_filters

sizes = st.sampled_from([1, 3, 63, 64, 65, 130])


def oracle(x: np.ndarray, w: np.ndarray, stride: int, padding: int) -> np.ndarray:
    """A convolution of signs, place by place."""
    edges = [(0, 0), (0, 0), (padding, padding), (padding, padding)]
    x = np.pad(np.where(x >= 0, 1, -1), edges)
    w = np.where(w >= 0, 1, -1)
    kh, kw = w.shape[2:]
    height, width = (x.shape[2] - kh) // stride + 1, (x.shape[3] - kw) // stride + 1
    out = np.zeros((len(x), len(w), height, width))
    for i, j in np.ndindex(height, width):
        seen = x[:, None, :, i * stride : i * stride + kh, j * stride : j * stride + kw]
        out[:, :, i, j] = (seen * w[None]).sum((2, 3, 4))
    return out


def drawn(seed: int, *shape: int) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(x.abs() < 0.1, 0.0, x)  # zeros have a sign, too


@pytest.fixture(params=["chosen", "generic", "reference"])
def served(request, monkeypatch):
    """By the best instruction set, the plain one, and plain torch."""
    if request.param == "reference":
        monkeypatch.setattr(dispatch, "forced", lambda: "reference")
        yield
        return
    if kernels.backend() != "cpu":
        pytest.skip("the C extension was not built")
    from distcomp.kernels import _cpu

    best = _cpu.instruction_set()
    if request.param == "generic":
        _cpu.use("generic")
    yield
    _cpu.use(best)


@pytest.mark.parametrize(
    ("channels", "outputs", "kernel", "stride", "padding", "side"),
    [(1, 1, 1, 1, 0, (1, 1)), (3, 5, 3, 1, 1, (5, 7)), (64, 8, 3, 1, 1, (4, 9)), (65, 9, 3, 2, 1, (6, 6)),
     (130, 17, 5, 2, 3, (7, 4)), (70, 16, 2, 3, 0, (8, 8)), (128, 3, 1, 1, 0, (3, 11))],
)  # fmt: skip
def test_a_packed_convolution_is_the_convolution_of_signs(
    served, channels, outputs, kernel, stride, padding, side
) -> None:
    x, w = drawn(1, 2, channels, *side), drawn(2, outputs, channels, kernel, kernel)
    scale, bias = drawn(3, outputs), drawn(4, outputs)
    got = binary_conv2d(x, pack_filters(w), tuple(w.shape), scale, bias, stride, padding)
    expected = oracle(x.numpy(), w.numpy(), stride, padding).astype(np.float32)
    expected = expected * scale.numpy()[:, None, None] + bias.numpy()[:, None, None]
    assert np.array_equal(got.numpy(), expected)


@pytest.mark.parametrize("rows", [0, 1, 5, 64])
def test_a_packed_product_is_the_product_of_signs(served, rows) -> None:
    x, w = drawn(5, rows, 200), drawn(6, 21, 200)
    shape = (21, 200, 1, 1)
    got = binary_linear(x, pack_filters(w.view(shape)), shape, torch.ones(21), torch.zeros(21))
    assert np.array_equal(got.numpy(), np.where(x >= 0, 1, -1) @ np.where(w >= 0, 1, -1).T)


@given(sizes, sizes, st.sampled_from([1, 2, 3]))
@settings(max_examples=15)
def test_what_was_packed_is_unpacked(outputs, channels, side) -> None:
    w = drawn(outputs + channels, outputs, channels, side, side)
    words = pack_filters(w)
    assert torch.equal(unpack_filters(words, tuple(w.shape)), torch.where(w < 0, -1.0, 1.0))
    assert words.shape == (-(-outputs // 8), side * side, -(-channels // 64), 8)


@pytest.mark.parametrize("convert", [precision.bnn, precision.xnor_net], ids=["bnn", "xnor_net"])
def test_a_packed_model_computes_the_same_and_its_checkpoint_is_small(convert, tmp_path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64),
        nn.Conv2d(64, 128, 3, padding=1, stride=2), nn.BatchNorm2d(128),
        nn.Conv2d(128, 64, 3, bias=False), nn.Flatten(),
        nn.Linear(256, 128), nn.BatchNorm1d(128), nn.Linear(128, 10),
    )  # fmt: skip
    convert(net)
    x = torch.randn(4, 3, 8, 8)
    net(x)  # batch norms see something
    seen = {}
    for i in (2, 4, 6):  # a sign may turn where the last bit of what is before it differs: layer by layer
        net[i].register_forward_hook(lambda _, __, y, i=i: seen.setdefault((i, "out"), y.detach()))
        net[i - 1].register_forward_hook(lambda _, __, y, i=i: seen.setdefault(i, y.detach()))
    net.eval()(x)
    plain_bytes = sum(4 * net[i].weight.numel() for i in (2, 4, 6))
    packed = precision.pack(net)
    for i in (2, 4, 6):
        torch.testing.assert_close(packed[i](seen[i]), seen[i, "out"], rtol=1e-4, atol=1e-4)
    expected = packed(x)
    assert plain_bytes / sum(packed[i].words.nbytes for i in (2, 4, 6)) == 32
    torch.save(packed.state_dict(), tmp_path / "packed.pt")
    assert (tmp_path / "packed.pt").stat().st_size < plain_bytes / 6
    for part in (2, 4, 6):
        packed[part].words.zero_()
    packed.load_state_dict(torch.load(tmp_path / "packed.pt", weights_only=True))
    assert torch.equal(packed(x), expected)


def test_what_cannot_be_packed_is_refused_in_words() -> None:
    grouped = precision.bnn(nn.Conv2d(4, 4, 3, groups=2), skip=())
    for wrong, said in (
        (lambda: precision.pack(nn.Linear(2, 2)), "bnn or xnor_net"),
        (lambda: precision.pack(grouped), "grouped"),
        (lambda: binary_linear(torch.ones(2, 3), pack_filters(torch.ones(1, 2, 1, 1)), (1, 2, 1, 1),
                               torch.ones(1), torch.ones(1)), "2 values"),
        (lambda: binary_conv2d(torch.ones(1, 2, 1, 1), pack_filters(torch.ones(1, 2, 3, 3)), (1, 2, 3, 3),
                               torch.ones(1), torch.ones(1)), "does not fit"),
    ):  # fmt: skip
        with pytest.raises(DistcompError, match=said):
            wrong()


@pytest.mark.parametrize(
    ("convert", "fewer"),
    [
        (lambda net: precision.dorefa(net, 2, 2), 14),
        (lambda net: precision.fixed_point(net, "Q2.6", skip=("first", "last")), 3.5),
        (lambda net: precision.binary_connect(net, skip=("first", "last")), 25),
        (lambda net: precision.ttq(net), 14),
        (lambda net: net, 1),
    ],
    ids=["dorefa", "fixed_point", "binary_connect", "ttq", "plain"],
)  # fmt: skip
def test_a_packed_checkpoint_is_the_baked_model_bit_for_bit(convert, fewer, tmp_path) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 96), nn.Linear(96, 96), nn.BatchNorm1d(96), nn.Linear(96, 2)]
    net = convert(nn.Sequential(*layers))
    packed = precision.packed_state_dict(net)
    torch.save(packed, tmp_path / "packed.pt")
    state = precision.unpacked_state_dict(torch.load(tmp_path / "packed.pt", weights_only=True))
    baked = precision.remove(net).state_dict()
    assert list(state) == list(baked)
    assert all(torch.equal(one, two) for one, two in zip(state.values(), baked.values(), strict=True))
    weight_bytes = sum(one.nbytes for name, one in packed.items() if name.startswith("1.weight"))
    assert 4 * 96 * 96 / weight_bytes >= fewer


def test_a_damaged_packed_checkpoint_is_refused() -> None:
    packed = precision.packed_state_dict(precision.binary_connect(nn.Linear(40, 40)))
    short = {**packed, "weight:codes": packed["weight:codes"][:-1]}
    headless = {name: one for name, one in packed.items() if name != "weight:values"}
    valueless = {**packed, "weight:values": packed["weight:values"][:1]}
    for damaged in (short, headless, valueless):
        with pytest.raises(DistcompError, match="save it again"):
            precision.unpacked_state_dict(damaged)
