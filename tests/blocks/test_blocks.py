"""Blocks: their parameters are those of their formulas, what is copied is copied, and swap refuses in
words."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from distcomp import DistcompError, blocks
from distcomp.parametrize import install
from distcomp.structured import SVD

MAKERS = {
    "separable": blocks.separable(),
    "grouped": blocks.grouped(4),
    "shift": blocks.shift(3),
    "bottleneck": blocks.bottleneck(),
    "resnext": blocks.resnext(4),
    "fire": blocks.fire(),
    "inception": blocks.inception(),
    "mlpconv": blocks.mlpconv(),
    "enet asymmetric": blocks.enet("asymmetric"),
    "enet dilated": blocks.enet("dilated", 2),
    "enet regular": blocks.enet("regular"),
}


def network(stride: int = 1, outputs: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, outputs, 3, stride, 1), nn.ReLU(),
        blocks.GlobalAveragePool(), nn.Linear(outputs, 10),
    )  # fmt: skip


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("outputs", [16, 24])
@pytest.mark.parametrize("name", MAKERS)
def test_every_block_keeps_the_shape_trains_and_copies_the_bias(name, outputs, stride) -> None:
    net = network(stride, outputs)
    conv, x = net[2], torch.randn(4, 16, 8, 8)
    shape = conv(x).shape
    (done,) = blocks.swap(net, "2", MAKERS[name])
    assert net[2](x).shape == shape
    assert done.before == sum(p.numel() for p in conv.parameters())
    assert done.after == sum(p.numel() for p in net[2].parameters())
    assert "bias" in done.copied
    given = [p for key, p in net[2].named_parameters() if key.endswith("bias")]
    assert any(torch.equal(p[: len(conv.bias)], conv.bias[: len(p)]) for p in given)
    net(torch.randn(4, 1, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def numbers(block: nn.Module) -> int:
    """Of convolutions, biases and norms left out."""
    return sum(part.weight.numel() for part in block.modules() if isinstance(part, nn.Conv2d))


def test_their_parameters_are_those_of_the_papers_formulas() -> None:
    conv = nn.Conv2d(16, 32, 3, padding=1)
    assert numbers(blocks.separable()(conv)) == 9 * 16 + 16 * 32
    assert numbers(blocks.grouped(4)(conv)) == 9 * 16 * 16 // 4 + 16 * 32
    assert numbers(blocks.shift(3)(conv)) == 3 * 16 * 16 + 3 * 16 * 32
    assert numbers(blocks.fire(0.125)(conv)) == 16 * 4 + 4 * 16 + 9 * 4 * 16
    assert numbers(blocks.bottleneck(4)(conv)) == 16 * 8 + 9 * 8 * 8 + 8 * 32 + 16 * 32  # with its shortcut
    assert numbers(blocks.resnext(8, 2)(conv)) == 16 * 16 + 9 * 16 * 16 // 8 + 16 * 32 + 16 * 32
    assert numbers(blocks.mlpconv()(conv)) == 9 * 16 * 32 + 2 * 32 * 32
    assert numbers(blocks.enet("asymmetric")(conv)) == 16 * 8 + 2 * 5 * 8 * 8 + 8 * 32
    assert (
        numbers(blocks.inception()(conv)) == 16 * 8 + (16 * 8 + 9 * 8 * 16) + (16 * 2 + 25 * 2 * 4) + 16 * 4
    )


def test_channels_move_by_their_offset_and_what_comes_in_is_zero() -> None:
    x = torch.randn(2, 20, 5, 4)  # two of each offset, and two more that stay
    y = blocks.shifted_channels(x).numpy()
    whole = np.pad(x.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    offsets = [(i, j) for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    for group, (i, j) in enumerate(offsets):
        for channel in (2 * group, 2 * group + 1):
            np.testing.assert_array_equal(y[:, channel], whole[:, channel, i : i + 5, j : j + 4])
    np.testing.assert_array_equal(y[:, 16:], x.numpy()[:, 16:])


def test_few_channels_move_too() -> None:
    x = torch.randn(1, 4, 3, 3)
    assert blocks.shifted_channels(x).shape == x.shape
    assert not torch.equal(blocks.shifted_channels(x), x)


def test_the_nearest_separable_convolution_is_copied() -> None:
    """Of each input channel, the rank-1 term of its kernels; a separable convolution comes back whole."""
    conv = nn.Conv2d(6, 10, 3, padding=1)
    block = blocks.separable()(conv)
    block.copy_from(conv)
    depthwise, mix = block.layers[0].weight.detach(), block.layers[-1].weight.detach()
    copied = (mix[:, :, 0, 0, None, None] * depthwise[None, :, 0]).numpy()
    for channel in range(6):
        u, s, v = np.linalg.svd(conv.weight.detach().numpy()[:, channel].reshape(10, 9), full_matrices=False)
        np.testing.assert_allclose(
            copied[:, channel].reshape(10, 9), s[0] * np.outer(u[:, 0], v[0]), atol=1e-5
        )


def test_mlpconv_begins_as_the_convolution() -> None:
    conv, x = nn.Conv2d(3, 8, 3, padding=1), torch.randn(2, 3, 6, 6)
    block = blocks.mlpconv()(conv)
    block.copy_from(conv)
    torch.testing.assert_close(block(x), torch.relu(conv(x)))


def test_grouped_weights_are_those_within_the_groups() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1)
    block = blocks.grouped(2)(conv)
    block.copy_from(conv)
    assert torch.equal(block.layers[0].weight[:4], conv.weight[:4, :4])
    assert torch.equal(block.layers[0].weight[4:], conv.weight[4:, 4:])


def test_enets_first_block_puts_pooled_inputs_beside_filters() -> None:
    x = torch.randn(2, 3, 9, 8)
    first = blocks.ENetInitial(3, 16).eval()
    assert first(x).shape == (2, 16, 5, 4)
    assert first.convolution.out_channels == 13


def test_type_device_and_mode_are_the_convolutions() -> None:
    net = network().to(torch.bfloat16).eval()
    blocks.swap(net, "2", blocks.shift())
    assert net[2].mix.weight.dtype == torch.bfloat16
    assert not net[2].training
    assert net(torch.randn(2, 1, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_swap_refuses_in_words_and_changes_nothing() -> None:
    net = network()
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(DistcompError, match="'fc' names no 2-D convolution; there are: 0, 2"):
        blocks.swap(net, "fc", blocks.shift())
    odd = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 4))
    with pytest.raises(DistcompError, match="square, odd kernel"):
        blocks.swap(odd, "*", blocks.shift())
    assert isinstance(odd[0], nn.Conv2d)
    shared = nn.ModuleDict({"one": net[2], "two": net[2]})
    with pytest.raises(DistcompError, match="used in 2 places"):
        blocks.swap(shared, "*", blocks.shift())
    install(net, "2.weight", SVD((16, 16, 3, 3), 4))
    with pytest.raises(DistcompError, match="2 is parametrized"):
        blocks.swap(net, "2", blocks.shift())
    assert set(state) - set(net.state_dict()) == {"2.weight"}
    with pytest.raises(DistcompError, match="dilated, asymmetric, not 'wide'"):
        blocks.swap(network(), "2", blocks.enet("wide"))


def test_a_wrapped_model_is_refused() -> None:
    with pytest.raises(DistcompError, match="swap first, then wrap"):
        blocks.swap(nn.DataParallel(network()), "*", blocks.shift())
