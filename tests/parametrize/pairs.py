"""Two of quantizer, mask, codebook and structure on one weight, through the calls that users have."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import nn

from distcomp import precision
from distcomp.parametrize import chain, install, parameters
from distcomp.pruning import Codebook, Mask
from tests.parametrize.toys import LowRank, network

W = "0.weight"
RANK, VALUES = 3, 8


def quantizer(model: nn.Module, seed: int) -> None:
    precision.gradual(model, None, "Q2.4", skip=("2",))


def mask(model: nn.Module, seed: int) -> None:
    weight = model[0].weight  # type: ignore[index]
    link = Mask(weight)
    link.mask.copy_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.6)
    install(model, W, link)


def codebook(model: nn.Module, seed: int) -> None:
    install(model, W, Codebook.of(parameters(model, W), VALUES))  # of this weight, where share() takes all


def structure(model: nn.Module, seed: int) -> None:
    install(model, W, LowRank(RANK))


LINKS: dict[str, Callable[[nn.Module, int], None]] = {
    "quantizer": quantizer,
    "mask": mask,
    "codebook": codebook,
    "structure": structure,
}
OWNERS = {"quantizer": "precision", "mask": "pruning", "codebook": "sharing", "structure": "structured"}
PAIRS = list(itertools.combinations(LINKS, 2))


def built(names: tuple[str, ...], seed: int) -> nn.Sequential:
    """A network of its own, with these on its first weight in this order."""
    model = network(seed)
    for name in names:
        LINKS[name](model, seed)
    return model


def kinds(model: nn.Module) -> list[str]:
    return [type(link).__name__ for link in chain(model, W)]
