"""Fast convolutions equal the plain one, forward and backward, and their memory is what is said."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck

from distcomp import DistcompError, blocks
from distcomp.blocks.mec import lowered
from distcomp.blocks.winograd import transforms

few = settings(max_examples=12)


def direct(x: np.ndarray, w: np.ndarray, stride: int, padding: int) -> np.ndarray:
    """The definition of a convolution, sum by sum."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    kh, kw = w.shape[2:]
    rows, columns = (x.shape[2] - kh) // stride + 1, (x.shape[3] - kw) // stride + 1
    y = np.zeros((x.shape[0], w.shape[0], rows, columns))
    for i in range(rows):
        for j in range(columns):
            patch = x[:, :, i * stride : i * stride + kh, j * stride : j * stride + kw]
            y[:, :, i, j] = np.einsum("ncab,ocab->no", patch, w)
    return y


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@few
@given(st.sampled_from([2, 4]), st.integers(3, 9), st.integers(3, 9), st.integers(0, 2), st.integers(1, 3))
def test_winograd_is_the_convolution(tile, height, width, padding, channels) -> None:
    x, w = drawn(0, 2, channels, height, width), drawn(1, 3, channels, 3, 3)
    y = blocks.winograd_conv2d(x, w, tile, (padding, padding))
    np.testing.assert_allclose(y.numpy(), direct(x.numpy(), w.numpy(), 1, padding), atol=1e-11)


@few
@given(st.integers(1, 3), st.integers(0, 2), st.integers(1, 3), st.integers(1, 4), st.integers(4, 8))
def test_mec_is_the_convolution(stride, padding, height, width, size) -> None:
    x, w = drawn(0, 2, 3, size, size + 1), drawn(1, 4, 3, height, width)
    y = blocks.mec_conv2d(x, w, stride, (padding, padding))
    np.testing.assert_allclose(y.numpy(), direct(x.numpy(), w.numpy(), stride, padding), atol=1e-12)


@pytest.mark.parametrize("tile", [2, 4])
def test_the_backward_of_winograd_is_the_derivative(tile) -> None:
    x, w = drawn(0, 1, 2, 5, 7).requires_grad_(), drawn(1, 2, 2, 3, 3).requires_grad_()
    assert gradcheck(lambda x, w: blocks.winograd_conv2d(x, w, tile, (1, 1)), (x, w))


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1), (3, 0)])
def test_the_backward_of_mec_is_the_derivative(stride, padding) -> None:
    x, w = drawn(0, 2, 2, 6, 5).requires_grad_(), drawn(1, 3, 2, 3, 2).requires_grad_()
    assert gradcheck(lambda x, w: blocks.mec_conv2d(x, w, stride, (padding, padding)), (x, w))


def test_winograd_multiplies_as_often_as_is_said() -> None:
    """(t + 2)^2 products of the transformed for 9 t^2 of the plain one."""
    for tile, fewer in ((2, 2.25), (4, 4.0)):
        bt, g, at = transforms(tile, torch.zeros((), dtype=torch.float64))
        assert g.shape[0] == bt.shape[0] == at.shape[1] == tile + 2
        assert 9 * tile**2 / g.shape[0] ** 2 == fewer


@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "fewer"),
    [((1, 3, 227, 227), 11, 4, 2.67), ((1, 3, 230, 230), 7, 2, 3.41), ((1, 64, 58, 58), 3, 1, 2.89),
     ((1, 32, 14, 14), 5, 1, 3.57)],
)  # fmt: skip
def test_the_lowered_input_is_as_large_as_is_said(shape, kernel, stride, fewer) -> None:
    im2col, mec = blocks.lowered_bytes(shape, (kernel, kernel), stride)
    x = torch.zeros(shape)
    columns = (shape[3] - kernel) // stride + 1
    assert mec == 4 * lowered(x, columns, kernel, stride).numel()
    assert im2col == 4 * nn.functional.unfold(x, kernel, stride=stride).numel()
    assert im2col / mec == pytest.approx(fewer, abs=0.01)


@pytest.mark.parametrize("make", [blocks.winograd(2), blocks.winograd(4), blocks.mec()])
def test_a_swapped_convolution_computes_and_learns_as_before(make) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1, bias=False))
    x = drawn(2, 2, 3, 9, 7).float()
    before = net(x)
    before.square().mean().backward()
    gradients = [parameter.grad.clone() for parameter in net.parameters()]
    done = blocks.swap(net, "*", make)
    assert [one.copied for one in done] == [("weight", "bias"), ("weight",)]
    after = net(x)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
    after.square().mean().backward()
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-3)


def test_geometries_that_they_cannot_do_are_refused() -> None:
    with pytest.raises(DistcompError, match="Winograd's convolution is 3 x 3 of stride 1"):
        blocks.winograd()(nn.Conv2d(3, 3, 3, stride=2))
    with pytest.raises(DistcompError, match="tiles of 2 or 4, not 3"):
        blocks.WinogradConv2d(3, 3, tile=3)
    with pytest.raises(DistcompError, match="MEC takes one group"):
        blocks.mec()(nn.Conv2d(4, 4, 3, groups=2))
    for other in ({"dilation": 2}, {"padding_mode": "circular"}, {"stride": (1, 2)}, {"padding": "same"}):
        with pytest.raises(DistcompError, match="MEC takes one group"):
            blocks.MECConv2d(4, 4, 3, **other)
    with pytest.raises(DistcompError, match="zeros as padding"):
        blocks.mlpconv()(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"))


def test_accnet_splats_and_slices_the_signal_itself() -> None:
    """Without a blur, slicing what was splatted gives each pixel's value back where no cell is shared."""
    net = blocks.AccNet(cells=2, depth=0)
    x = torch.tensor([0.0, 1.0, 0.0, 1.0]).view(1, 1, 2, 2)
    torch.testing.assert_close(net(x), x, atol=1e-3, rtol=0)
    grid = net.splat(torch.full((1, 1, 1, 1), 0.25))
    torch.testing.assert_close(grid.flatten(), torch.tensor([0.25 * 0.75, 0.25 * 0.25, 0.75, 0.25]))


def test_accnet_learns_to_imitate_a_bilateral_filter() -> None:
    torch.manual_seed(0)
    draw_from = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        return torch.rand(2, 1, 12, 12, generator=draw_from)

    errors = blocks.imitate(blocks.AccNet(cells=5, components=3, kernel=3), blocks.bilateral, draw, 60, 2e-2)
    assert np.mean(errors[-5:]) < 0.5 * np.mean(errors[:3])


def test_the_bilateral_filter_is_its_formula() -> None:
    x = torch.rand(1, 1, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    image = np.pad(x[0, 0].numpy(), 1, mode="reflect")
    i, j = 2, 3
    total = weights = 0.0
    for di in (-1, 0, 1):
        for dj in (-1, 0, 1):
            other, own = image[i + 1 + di, j + 1 + dj], image[i + 1, j + 1]
            weight = np.exp(-(di**2 + dj**2) / (2 * 2.0**2)) * np.exp(-((other - own) ** 2) / (2 * 0.1**2))
            total, weights = total + weight * other, weights + weight
    assert float(blocks.bilateral(x, 2.0, 0.1, reach=1)[0, 0, i, j]) == pytest.approx(total / weights)


def test_a_cp_layer_is_the_sum_of_separable_kernels() -> None:
    torch.manual_seed(0)
    layer = blocks.CPLayer(2, 3, components=4, kernel=3, dims=2).double()
    a, b = layer.mix_in.weight[:, :, 0, 0], layer.mix_out.weight[:, :, 0, 0]
    one, two = layer.along[0].weight[:, 0, :, 0], layer.along[1].weight[:, 0, 0, :]
    kernel = torch.einsum("or,ri,ra,rb->oiab", b, a, one, two).detach().numpy()
    x = drawn(3, 1, 2, 6, 6)
    np.testing.assert_allclose(layer(x).detach().numpy(), direct(x.numpy(), kernel, 1, 1), atol=1e-12)
