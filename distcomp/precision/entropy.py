"""Weighted-entropy quantization of weights and activations (Park 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distcomp.errors import DistcompError
from distcomp.parametrize import Parametrization
from distcomp.precision.convert import BitWidths, Quantizers, convert
from distcomp.precision.noise import straight_through
from distcomp.precision.quantizer import FULL, WeightQuantizer

MOST_ROUNDS = 20
STEPS = (1.0, 0.5, 0.25, 0.125)


def weighted_entropy(
    model: nn.Module,
    weights: int = 4,
    activations: int = 32,
    *,
    every: int = 1,
    skip: tuple[str, ...] = ("first", "last"),
) -> nn.Module:
    """Cluster weights, and choose logarithmic levels of inputs, so that the weighted entropy is largest.

    ::

        S = -sum_n I_n P_n log P_n       P_n: the share of values in cluster n,  I_n: their mean w^2
        every weight of a cluster becomes sqrt(I_n), with its sign

    Negative and positive weights have half the ``2^weights`` clusters each. Boundaries begin at equal counts
    and move, one at a time, to where S is largest, until none moves. Inputs become 0 or ``2^(o + i s)``,
    i = 0, 1, ...; offset o and step s are chosen the same way. Both are chosen anew in every ``every``-th
    forward in training. The gradient passes straight through (for inputs, where they are positive).

    Source: Park et al., "Weighted-entropy-based quantization for deep neural networks", CVPR 2017. We differ:
    the search of o tries whole steps from the largest input down.

    Raises DistcompError for weights outside 2..8 bits, or activations outside 2..8 and 32.
    """
    if not 2 <= weights <= 8 or not (2 <= activations <= 8 or activations == FULL):
        raise DistcompError(
            f"weighted_entropy takes 2 to 8 bits (activations also 32: as they are), not {weights} and "
            f"{activations}"
        )

    def plan(name: str, layer: nn.Module) -> Quantizers:
        parameters: dict[str, Parametrization] = {"weight": ClusteredWeight(weights, every)}
        input_quantizer = LogActivation(activations, every) if activations < FULL else None
        return Quantizers(BitWidths(weights, activations), parameters, input_quantizer)

    return convert(model, plan, skip)


def boundaries(magnitudes: Tensor, clusters: int) -> Tensor:
    """Where to cut rising magnitudes: ``clusters + 1`` indices, the first 0, the last their number.

    Each boundary in turn goes to the place between its neighbours where S is largest; of equal ones, the
    lowest. float64.
    """
    n = magnitudes.numel()
    mass = torch.cat([magnitudes.new_zeros(1, dtype=torch.float64), magnitudes.double().square().cumsum(0)])
    cut = (torch.arange(clusters + 1, dtype=torch.float64) * n / clusters).long().tolist()
    for _ in range(MOST_ROUNDS):
        moved = False
        for k in range(1, clusters):
            low, high = cut[k - 1], cut[k + 1]
            cuts = torch.arange(low, high + 1)
            gain = _weighted(mass, low, cuts, n) + _weighted(mass, cuts, high, n)
            best = low + int(gain.argmax())
            moved |= best != cut[k]
            cut[k] = best
        if not moved:
            break
    return torch.tensor(cut, dtype=torch.int64)


def _weighted(mass: Tensor, start: Tensor | int, stop: Tensor | int, n: int) -> Tensor:
    """``-I P log P`` of clusters [start, stop): their mass times their surprise, over n; 0 if empty."""
    share = torch.as_tensor(stop - start, dtype=torch.float64) / n
    surprise = torch.where(share > 0, -share.clamp(min=1 / (2 * n)).log(), 0.0)
    return (mass[stop] - mass[start]) / n * surprise


def representatives(magnitudes: Tensor, cut: Tensor) -> Tensor:
    """``sqrt(I_n)`` of each cluster of rising magnitudes; 0 where one is empty."""
    mass = torch.cat([magnitudes.new_zeros(1, dtype=torch.float64), magnitudes.double().square().cumsum(0)])
    counts = (cut[1:] - cut[:-1]).clamp(min=1)
    return ((mass[cut[1:]] - mass[cut[:-1]]) / counts).clamp(min=0).sqrt()


def clustered(w: Tensor, bits: int) -> Tensor:
    """Every weight replaced by its cluster's representative. On the CPU, sorted; not for huge tensors."""
    flat = w.detach().flatten()
    out = torch.zeros_like(flat)
    for direction in (1.0, -1.0):
        side = torch.nonzero(flat * direction > 0).flatten()
        if not side.numel():
            continue
        magnitudes, order = (flat[side] * direction).sort(stable=True)
        cut = boundaries(magnitudes.cpu(), 1 << (bits - 1)).to(w.device)
        values = representatives(magnitudes, cut).to(w.dtype) * direction
        out[side[order]] = torch.repeat_interleave(values, cut[1:] - cut[:-1])
    return out.view_as(w)


class ClusteredWeight(WeightQuantizer):
    """Weights in clusters of the largest weighted entropy; kept between the forwards that choose anew."""

    values: Tensor

    def __init__(self, bits: int, every: int) -> None:
        super().__init__()
        self.bits = bits
        self.every = every
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("values", torch.zeros(0, dtype=torch.float32), persistent=False)

    calls: Tensor

    @property
    def width(self) -> float:
        """Of the number of a cluster."""
        return self.bits

    def scales(self, weight: Tensor) -> int:
        """A representative for each cluster."""
        return 1 << self.bits

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def decode(self, w: Tensor) -> Tensor:
        """The weight that is computed with."""
        due = self.training and int(self.calls) % self.every == 0
        if self.training:
            self.calls += 1
        if due or not self.training or self.values.shape != w.shape:
            self.values = clustered(w, self.bits)
        return straight_through(w, self.values)


def log_levels(x: Tensor, offset: float, step: float, bits: int) -> Tensor:
    """The number of the level of each input: 0 for zero, i + 1 for ``2^(offset + i step)``, to the nearest in
    the logarithm."""
    top = (1 << bits) - 1
    exponent = torch.log2(x.clamp(min=torch.finfo(torch.float32).tiny))
    return torch.where(x > 0, torch.round((exponent - offset) / step) + 1, 0.0).clamp(0, top)


def weighted_entropy_of(x: Tensor, levels: Tensor, count: int) -> float:
    """S of values ``x`` in clusters ``levels`` (0 .. count - 1), with importance x^2."""
    index = levels.flatten().long()
    share = torch.bincount(index, minlength=count).double() / index.numel()
    mass = torch.zeros(count, dtype=torch.float64).scatter_add_(0, index, x.flatten().double().square())
    surprise = torch.where(share > 0, -share.clamp(min=1e-300).log(), 0.0)
    return float((mass / index.numel() * surprise).sum())


class LogActivation(nn.Module):
    """Inputs as 0 or powers of ``2^step``; offset and step of the largest weighted entropy."""

    chosen: Tensor

    def __init__(self, bits: int, every: int) -> None:
        super().__init__()
        self.bits = bits
        self.every = every
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("chosen", torch.tensor([0.0, 1.0], dtype=torch.float64))

    calls: Tensor

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """The quantized inputs; negative ones become 0."""
        if self.training:
            if int(self.calls) % self.every == 0:
                self.chosen.copy_(torch.tensor(self.search(x.detach().cpu()), dtype=torch.float64))
            self.calls += 1
        offset, step = self.chosen.tolist()
        level = log_levels(x.detach(), offset, step, self.bits)
        value = torch.where(level > 0, torch.exp2(offset + (level - 1) * step), 0.0).to(x.dtype)
        return straight_through(x, value, x > 0)

    def search(self, x: Tensor) -> tuple[float, float]:
        """(offset, step) of the largest S; the first of equal ones."""
        largest = float(x.max()) if x.numel() else 0.0
        if not 0 < largest < float("inf"):
            return (0.0, 1.0)
        top, count = float(torch.tensor(largest, dtype=torch.float32).log2().ceil()), 1 << self.bits
        tried = [
            (top - (count - 2) * step - down * step, step) for step in STEPS for down in range(count // 2)
        ]
        return max(
            tried,
            key=lambda levels: weighted_entropy_of(x, log_levels(x, levels[0], levels[1], self.bits), count),
        )
