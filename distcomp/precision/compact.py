"""A recipe for compact binary networks: five measures, each of which may be left out (Tang 2017)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distcomp.errors import DistcompError
from distcomp.parametrize import parameters
from distcomp.precision.binary import BinaryWeight
from distcomp.precision.convert import BitWidths, Quantizers, convert, converted, latent_of
from distcomp.precision.noise import sign, straight_through
from distcomp.precision.ternary import TrainedTernary


def compact_binary(
    model: nn.Module,
    *,
    prelu: bool = True,
    scale_last: bool = True,
    binarizations: int = 2,
    skip: tuple[str, ...] = ("first",),
) -> nn.Module:
    """Compute with signs of weights and several signs of each input; the last layer is binary, too.

    ::

        W = sign(w);    a = sum_i beta_i h_i,   h_i = sign(r_i),  beta_i = mean|r_i| of a sample,
                                                r_1 = x,  r_(i+1) = r_i - beta_i h_i

    Of the paper's five measures: ``prelu`` puts a PReLU in the place of every ReLU (instead of scales on
    weights), ``scale_last`` a learnable factor behind the last layer, ``binarizations`` is the number of
    signs per input. The other two belong to the loop: a low learning rate for binary weights,
    :func:`slow_groups`, and a loss that draws weights to +-1, :func:`bipolar_penalty`.

    Source: Tang, Hua and Wang, "How to train a compact binary neural network with high accuracy?", AAAI 2017.
    We differ: the form of the residual expansion of inputs is ours, of the paper's idea.

    Raises DistcompError for fewer than one binarization.
    """
    if binarizations < 1:
        raise DistcompError(f"an input is binarized at least once, not {binarizations} times")
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1:]

    def plan(name: str, layer: nn.Module) -> Quantizers:
        output_quantizer = LearnedScale(layer) if scale_last and layer in last else None
        return Quantizers(
            BitWidths(1, binarizations),
            {"weight": BinaryWeight(1.0, None)},
            Residual(binarizations),
            output_quantizer,
        )

    convert(model, plan, skip)
    if prelu:
        _replace_relus(model)
    return model


class Residual(nn.Module):
    """An input as a sum of signs with magnitudes; the gradient passes where |x| <= 1."""

    def __init__(self, binarizations: int) -> None:
        super().__init__()
        self.binarizations = binarizations

    def forward(self, x: Tensor) -> Tensor:
        """``sum_i beta_i sign(r_i)``; magnitudes are means over a sample."""
        residual, total = x.detach(), torch.zeros_like(x)
        for _ in range(self.binarizations):
            beta = residual.abs().mean(dim=tuple(range(1, x.dim())), keepdim=True)
            term = beta * sign(residual)
            total, residual = total + term, residual - term
        return straight_through(x, total, x.abs() <= 1)


class LearnedScale(nn.Module):
    """A learnable factor; begins at ``1 / sqrt(n)`` of the layer's n products, which are +-1."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        weight: Tensor = layer.weight  # type: ignore[assignment]
        self.factor = nn.Parameter(
            weight.new_full((1,), weight[0].numel() ** -0.5)
        )  # FSDP2 shards no scalars

    def forward(self, y: Tensor) -> Tensor:
        """``factor y``."""
        return y * self.factor


def bipolar_penalty(model: nn.Module, strength: float = 1e-5) -> Tensor:
    """``strength * sum (1 - w^2)^+`` over latent binary weights, to be added to the loss.

    It draws them to +-1."""
    parts = [
        (1 - latent.square()).clamp(min=0).sum()
        for _, layer in converted(model)
        if (latent := latent_of(layer, "weight")) is not None
    ]
    if not parts:
        raise DistcompError("no layer is binary; call distcomp.precision.compact_binary(model) first")
    return strength * torch.stack(parts).sum()


def slow_groups(
    model: nn.Module, lr: float, slower: float = 0.1, shared: float = 0.01
) -> list[dict[str, Any]]:
    """Groups for an optimizer: all but two kinds of parameters, which learn more slowly, at ``lr``.

    Latent weights learn at ``slower * lr``, so that they seldom flip. Numbers that a whole layer shares (the
    two magnitudes of :func:`distcomp.precision.ttq`, the factor behind :func:`compact_binary`'s last layer)
    learn at ``shared * lr``: their gradients are sums over all its weights or outputs, and at the common rate
    of momentum SGD they run off before the weights have learned anything. Adam, whose steps do not grow with
    the gradient, does without.
    """
    latent = {id(parameter) for _, layer in converted(model) for parameter in parameters(layer, "weight")}
    common = {
        id(parameter)
        for part in model.modules()
        if isinstance(part, LearnedScale | TrainedTernary)
        for parameter in part.parameters(recurse=False)
    }
    groups: dict[float, list[nn.Parameter]] = {1.0: [], slower: [], shared: []}
    for parameter in model.parameters():
        groups[slower if id(parameter) in latent else shared if id(parameter) in common else 1.0].append(
            parameter
        )
    return [{"params": ones, "lr": share * lr} for share, ones in groups.items() if ones]


def _replace_relus(model: nn.Module) -> None:
    """PReLU in the place of every ReLU module: a slope each, as in the paper's initial 1/4."""
    for parent in model.modules():
        for name, child in list(parent.named_children()):
            if type(child) is nn.ReLU:
                setattr(parent, name, nn.PReLU())
