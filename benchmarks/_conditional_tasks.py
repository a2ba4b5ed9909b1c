"""Tasks for conditional computation: pairs of digits, a digit somewhere on a noisy canvas, and clusters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks._places import example

TEST = 4000


@dataclass(frozen=True)
class Batches:
    """Examples to train with, drawn anew in each step, and a fixed test set."""

    inputs: int
    classes: int
    test: tuple[Tensor, Tensor]
    _draw: object

    def __call__(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        batch: tuple[Tensor, Tensor] = self._draw(size, generator)  # type: ignore[operator]
        return batch


def pairs() -> Batches:
    """Two images side by side, label the last digit of their sum: 128 inputs."""
    digits = example("digits")
    train, held_out = digits.digits()
    test = digits.pairs(*held_out, TEST, torch.Generator().manual_seed(0))
    return Batches(128, 10, test, lambda size, draw: digits.pairs(*train, size, draw))


CANVAS, DIGIT = 12, 8


def shifted() -> Batches:
    """One digit at a random place on a noisy 12 x 12 canvas: ``[1, 12, 12]``."""
    train, held_out = example("digits").digits()

    def put(images: Tensor, labels: Tensor, size: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(images), (size,), generator=draw)
        canvas = 0.3 * torch.randn(size, 1, CANVAS, CANVAS, generator=draw) + float(images.min())
        corner = torch.randint(CANVAS - DIGIT + 1, (2, size), generator=draw)
        place = torch.arange(DIGIT)
        rows, columns = (corner[0, :, None] + place)[:, :, None], (corner[1, :, None] + place)[:, None, :]
        canvas[torch.arange(size)[:, None, None], 0, rows, columns] += images[chosen].view(
            size, DIGIT, DIGIT
        ) - float(images.min())
        return canvas, labels[chosen]

    test = put(*held_out, TEST, torch.Generator().manual_seed(0))
    return Batches(CANVAS * CANVAS, 10, test, lambda size, draw: put(*train, size, draw))


CLUSTERS, WIDTH, CLASSES = 8, 16, 4


def clustered() -> Batches:
    """Eight clusters in 16 dimensions, each with a linear classifier of its own: what experts are for."""
    fixed = torch.Generator().manual_seed(0)
    centers = 2 * torch.randn(CLUSTERS, WIDTH, generator=fixed)
    classifiers = torch.randn(CLUSTERS, WIDTH, CLASSES, generator=fixed)

    def draw(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        cluster = torch.randint(CLUSTERS, (size,), generator=generator)
        offset = torch.randn(size, WIDTH, generator=generator)
        labels = torch.einsum("nw,nwc->nc", offset, classifiers[cluster]).argmax(1)
        return centers[cluster] + offset, labels

    return Batches(WIDTH, CLASSES, draw(TEST, torch.Generator().manual_seed(1)), draw)
