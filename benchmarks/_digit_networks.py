"""Networks for digit pairs (128 inputs, 10 classes) that low-precision numbers are compared on."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch import nn


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(128, 96), nn.BatchNorm1d(96), nn.ReLU(),
        nn.Linear(96, 96), nn.BatchNorm1d(96), nn.ReLU(),
        nn.Linear(96, 96), nn.BatchNorm1d(96), nn.ReLU(),
        nn.Linear(96, 10),
    )  # fmt: skip


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 16)),
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 24, 3, padding=1, stride=2), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, stride=2), nn.BatchNorm2d(24), nn.ReLU(), nn.Flatten(),
        nn.Linear(24 * 8, 64), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


def deep() -> nn.Sequential:
    widths = [128, *[64] * 8]
    hidden = [
        part
        for before, width in itertools.pairwise(widths)
        for part in (nn.Linear(before, width), nn.BatchNorm1d(width), nn.ReLU())
    ]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 10))


def bare() -> nn.Sequential:
    """The deep one without norms, whose first weights keep the size of activations."""
    net = nn.Sequential(*(part for part in deep() if not isinstance(part, nn.BatchNorm1d)))
    for layer in net[1:-1:2]:
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    return net


NETWORKS: dict[str, Callable[[], nn.Sequential]] = {"mlp": mlp, "cnn": cnn, "deep": deep, "bare": bare}


def without_relus(net: nn.Module) -> nn.Module:
    """Signs are the non-linearity of a binary network; what a ReLU leaves would all be +1."""
    for name, child in list(net.named_children()):
        if isinstance(child, nn.ReLU):
            setattr(net, name, nn.Identity())
    return net
