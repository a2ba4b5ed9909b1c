"""A shrunk model computes what the masked one does, and is smaller."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from distcomp import DistcompError, pruning
from tests.pruning.training import network, sgd, train


class Block(nn.Module):
    """conv - norm - relu - conv - norm, and a way around, which may be a convolution, too."""

    def __init__(self, ins: int, outs: int, groups: int, norm: bool, depthwise: bool) -> None:
        super().__init__()
        middle = ins if depthwise else outs
        self.one = nn.Conv2d(ins, middle, 3, padding=1, groups=ins if depthwise else groups)
        self.norm_one = nn.BatchNorm2d(middle) if norm else nn.Identity()
        self.two = nn.Conv2d(middle, outs, 3, padding=1, bias=not norm)
        self.norm_two = nn.BatchNorm2d(outs) if norm else nn.Identity()
        self.around = nn.Identity() if ins == outs else nn.Conv2d(ins, outs, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm_two(self.two(self.relu(self.norm_one(self.one(x)))))
        out += self.around(x)
        return self.relu(out)


class Net(nn.Module):
    def __init__(self, widths: list[int], groups: int, norm: bool, depthwise: bool, head: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, widths[0], 3)
        pairs = itertools.pairwise(widths)
        self.blocks = nn.Sequential(*[Block(i, o, groups, norm, depthwise) for i, o in pairs])
        self.head, self.norm = head, nn.BatchNorm1d(widths[-1] * (1 if head == "mean" else 16))
        self.hidden = nn.Linear(self.norm.num_features, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(functional.gelu(self.stem(x)))
        x = functional.adaptive_avg_pool2d(x, 1 if self.head == "mean" else 4)
        x = torch.flatten(x, 1) if self.head == "mean" else x.view(x.size(0), -1)
        return self.last(torch.tanh(self.hidden(self.norm(x))))


def scrambled(net: nn.Module, seed: int) -> nn.Module:
    """Numbers that no initialisation gives, so that constants are none by chance."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator))
            tensor.abs_().add_(0.1) if name.endswith("running_var") else None
    return net.eval()


def prune(net: nn.Module, shares: tuple[float, float, float], seed: int) -> pruning.Pruner:
    """Filters, channels and whole layers die at random."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name in pruning.masks.weights_of(net):
        shape = net.get_parameter(name).shape
        draw = [torch.rand(size, generator=generator) for size in (shape[0], shape[1], 1)]
        rows, columns, all_of_it = (one >= share for one, share in zip(draw, shares, strict=True))
        mask = rows[:, None] & columns & all_of_it
        masks[name] = mask.view(*shape[:2], *[1] * (len(shape) - 2)).expand(shape)
    return pruning.fixed(net, masks)


def parameters(net: nn.Module) -> int:
    return sum(one.numel() for one in net.parameters())


def same(net: nn.Module, small: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(small(x), net(x), rtol=1e-5, atol=1e-5)


@settings(max_examples=80)
@given(
    st.lists(st.sampled_from([4, 8]), min_size=2, max_size=3), st.sampled_from([1, 2, 4]), st.booleans(),
    st.booleans(), st.sampled_from(["mean", "flat"]),
    st.tuples(*[st.sampled_from([0.0, 0.5, 0.8])] * 2, st.sampled_from([0.0, 0.3])), st.integers(0, 1000),
)  # fmt: skip
def test_outputs_are_those_of_the_masked_model(widths, groups, norm, depthwise, head, shares, seed):
    net = scrambled(Net(widths, groups, norm, depthwise, head).double(), seed)
    prune(net, shares, seed)
    small = pruning.shrink(net)
    same(net, small, torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(seed)).double())
    again = pruning.shrink(small)
    assert parameters(again) == parameters(small)


def test_sizes_are_those_of_what_lives_and_the_original_trains_on():
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    conv, linear = torch.ones(6, 2, 3, 3, dtype=torch.bool), torch.ones(8, 24, dtype=torch.bool)
    conv[[1, 4]] = False  # pruned filters are constants, which go into the biases behind
    linear.view(8, 6, 4)[:, 3] = False  # a channel that nobody reads
    linear[2:] = False
    pruner = pruning.fixed(net, {"0.weight": conv, "3.weight": linear})
    x = torch.randn(4, 2, 4, 4)
    before = copy.deepcopy(net.state_dict())
    small = pruning.shrink(net)
    shapes = {name: tuple(one.shape) for name, one in small.named_parameters()}
    assert shapes == {
        "0.weight": (3, 2, 3, 3), "0.bias": (3,), "3.weight": (2, 12), "3.bias": (2,), "5.weight": (3, 2),
        "5.bias": (3,),
    }  # fmt: skip
    same(net, small, x)
    assert all(torch.equal(one, before[name]) for name, one in net.state_dict().items())
    net(x).sum().backward()
    assert pruner.pruned["0.weight"].parameter.grad is not None


@pytest.mark.parametrize("norm", [False, True])
def test_a_branch_that_has_died_is_cut(norm):
    net = scrambled(Net([4, 4, 4], 1, norm, False, "mean"), 0)
    pruned = {name: torch.zeros(4, 4, 3, 3) for name in ("blocks.0.two.weight", "blocks.1.one.weight")}
    pruning.fixed(net, pruned)
    small = pruning.shrink(net)
    kept = [name for name, _ in small.named_modules() if name.startswith("blocks") and "." in name[7:]]
    assert not any("blocks.0.one" in name or "blocks.0.two" in name for name in kept)
    same(net, small, torch.randn(3, 2, 8, 8))


def test_depthwise_channels_and_groups_go_with_what_they_read():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 12, 3, groups=6), nn.ReLU(),
        nn.Conv2d(12, 9, 1, groups=3), nn.ReLU(), nn.Conv2d(9, 2, 1),
    )  # fmt: skip
    last = torch.ones(2, 9, 1, 1, dtype=torch.bool)
    last[:, 3:6] = False
    scrambled(net, 1)
    pruning.fixed(net, {"6.weight": last})
    small = pruning.shrink(net)
    sizes = [
        (one.in_channels, one.out_channels, one.groups) for one in small.children() if hasattr(one, "groups")
    ]
    assert sizes == [(3, 4, 1), (4, 8, 4), (8, 6, 2), (6, 2, 1)]
    same(net, small, torch.randn(2, 3, 5, 5))


class Twice(nn.Module):
    """A layer that is called twice, what fx does not know, and a sum of what is not known with what is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(torch.relu(self.layer(x))) + x
        return self.last(torch.cumsum(x, 1))


def test_what_is_not_known_keeps_its_size():
    net = Twice()
    prune(net, (0.6, 0.3, 0.0), 3)
    small = pruning.shrink(net)
    assert parameters(small) == parameters(net)
    same(net, small, torch.randn(3, 5))


class Choosing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_cannot_be_traced_is_refused_by_name():
    with pytest.raises(DistcompError, match=r"cannot trace '1.0' of Sequential"):
        pruning.shrink(nn.Sequential(nn.Linear(2, 2), nn.Sequential(Choosing())))


def test_what_structured_sparsity_learning_leaves_shrinks():
    model = network()
    optimizer = sgd(model)
    pruning.ssl(model, optimizer, until=40, filters=0.05, channels=0.05)
    train(model, optimizer, 60)
    small = pruning.shrink(model)
    assert small.get_submodule("0").out_features < 16
    assert parameters(small) < parameters(model)
    same(model, small, torch.randn(9, 12))
