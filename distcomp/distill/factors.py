"""Factor transfer's two small networks: one paraphrases the teacher, one translates the student."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from distcomp.distill.taps import Taps
from distcomp.distill.teachers import Batch, called
from distcomp.errors import DistcompError
from distcomp.parametrize import evaluating

SLOPE = 0.1
"""Of the leaky ReLUs."""


def _stack(sizes: tuple[tuple[int, int], ...], maps: bool, transposed: bool = False) -> nn.Sequential:
    """Layers with leaky ReLUs: 3 x 3 convolutions of maps, linear ones of vectors."""
    layers: list[nn.Module] = []
    for before, after in sizes:
        if not maps:
            layers.append(nn.Linear(before, after))
        elif transposed:
            layers.append(nn.ConvTranspose2d(before, after, 3, padding=1))
        else:
            layers.append(nn.Conv2d(before, after, 3, padding=1))
        layers.append(nn.LeakyReLU(SLOPE))
    return nn.Sequential(*layers)


def _encoder(channels: int, factors: int, maps: bool) -> nn.Sequential:
    return _stack(((channels, channels), (channels, factors), (factors, factors)), maps)


class Paraphraser(nn.Module):
    """An autoencoder of the teacher's features: ``[batch, channels, ...]`` to ``factors`` channels and back.

    Source: Kim et al., NeurIPS 2018: three convolutions of 3 x 3 with leaky ReLUs of slope 0.1, and as many
    transposed ones. ``maps=False``: linear layers, for features ``[batch, channels]``.
    """

    def __init__(self, channels: int, factors: int, maps: bool = True) -> None:
        super().__init__()
        if channels < 1 or factors < 1:
            raise DistcompError(
                f"a paraphraser has at least 1 channel and 1 factor, not {channels} and {factors}"
            )
        self.encoder = _encoder(channels, factors, maps)
        self.decoder = _stack(((factors, factors), (factors, channels), (channels, channels)), maps, True)

    def forward(self, features: Tensor) -> Tensor:
        """The features as they come back."""
        decoded: Tensor = self.decoder(self.encoder(features))
        return decoded

    @torch.no_grad()
    def factor(self, features: Tensor) -> Tensor:
        """The factor, without a gradient."""
        factor: Tensor = self.encoder(features)
        return factor


class Translator(nn.Module):
    """The same encoder on the student's features; trained with the student, dropped afterwards."""

    def __init__(self, channels: int, factors: int, maps: bool = True) -> None:
        super().__init__()
        self.encoder = _encoder(channels, factors, maps)

    def forward(self, features: Tensor) -> Tensor:
        """The student's factor."""
        factor: Tensor = self.encoder(features)
        return factor


def train_paraphraser(
    teacher: nn.Module,
    layer: str,
    batches: Iterable[Batch],
    paraphraser: Paraphraser,
    learning_rate: float = 1e-3,
) -> float:
    """Train a paraphraser on the features of the teacher's module ``layer``: ``mean((P(t) - t)^2)``, by Adam.

    It is frozen afterwards. Returns the last batch's error. Give it the same batches on every rank, or train
    it on one and load it on all: it is not exchanged.
    """
    taps = Taps(teacher, (layer,))
    optimizer = torch.optim.Adam(paraphraser.parameters(), learning_rate)
    error = float("nan")
    try:
        with evaluating(teacher):
            for batch in batches:
                with torch.no_grad():
                    called(teacher, batch)
                features = taps.taken()[layer]
                loss = functional.mse_loss(paraphraser(features), features)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                error = loss.item()
    finally:
        taps.remove()
    paraphraser.eval().requires_grad_(False)
    return error
