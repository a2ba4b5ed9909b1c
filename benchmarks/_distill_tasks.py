"""Tasks and networks on which distillation is compared: digits, pairs of them, and shifted ones."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from distcomp import distill
from distcomp.distill import Objective

Rows = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    train: Rows
    test: Rows


@cache
def pixels() -> Rows:
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    pixels = images.float()
    return ((pixels - pixels.mean(0)) / pixels.std())[order], labels[order]


def split(seed: int) -> tuple[Rows, Rows]:
    """897 images to train with and 900 to test with, another split for each seed."""
    images, labels = pixels()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[:897], order[897:]
    return (images[train], labels[train]), (images[test], labels[test])


def digits(seed: int) -> Data:
    train, test = split(seed)
    return Data(train, test)


def pairs(seed: int, count: int = 3000) -> Data:
    """Two images side by side; the last digit of the sum."""
    draw = torch.Generator().manual_seed(seed)

    def paired(rows: Rows, many: int) -> Rows:
        left, right = torch.randint(len(rows[0]), (2, many), generator=draw)
        return torch.cat([rows[0][left], rows[0][right]], 1), (rows[1][left] + rows[1][right]) % 10

    train, test = split(seed)
    return Data(paired(train, count), paired(test, 2000))


def shifted(seed: int) -> Data:
    """A digit at a random place on a noisy canvas of 12 x 12."""
    draw = torch.Generator().manual_seed(seed)

    def placed(rows: Rows) -> Rows:
        canvas = 0.25 * torch.randn(len(rows[0]), 1, 12, 12, generator=draw)
        places = torch.randint(5, (len(rows[0]), 2), generator=draw).tolist()
        for blank, image, (row, column) in zip(canvas, rows[0], places, strict=True):
            blank[0, row : row + 8, column : column + 8] += image.view(8, 8)
        return canvas, rows[1]

    train, test = split(seed)
    return Data(placed(train), placed(test))


def mlp(sizes: tuple[int, ...], seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(channels: int, seed: int, groups: int = 1) -> nn.Sequential:
    """Two stages; the second convolution may be grouped with a pointwise one after it (Moonshine's cheap
    block)."""
    torch.manual_seed(seed)
    second = (
        nn.Conv2d(channels, channels, 3, padding=1)
        if groups == 1
        else nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=groups), nn.Conv2d(channels, channels, 1)
        )
    )
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        second, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(channels * 9, 10),
    )  # fmt: skip


def train(
    network: nn.Module,
    rows: Rows,
    epochs: int,
    loss: Objective | None = None,
    teacher: object = None,
    *,
    seed: int = 0,
    rate: float = 3e-3,
) -> distill.Distill:
    """Adam, batches of 64 in an order of the seed. The Distill is returned with its taps on."""
    loss = loss or distill.hard_labels()
    teach = distill.Distill(network, teacher or nn.Sequential(nn.Identity()), loss, seed=seed)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], rate)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(rows[0]), generator=order).split(64):
            optimizer.zero_grad()
            teach(rows[0][batch], rows[1][batch]).backward()
            optimizer.step()
    return teach


@torch.no_grad()
def accuracy(network: nn.Module, rows: Rows) -> float:
    network.eval()
    return (network(rows[0]).argmax(1) == rows[1]).float().mean().item()
