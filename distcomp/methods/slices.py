"""What GradiVeQ knows and computes on one rank alone: its cycle, slices of a convolution's gradient, and the
subspace they lie in."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.layout import ParamSlice
from distcomp.methods.base import SHAPES
from distcomp.methods.partition import Rule


@dataclass(frozen=True)
class Cycle:
    """``learn`` steps of gradients that are sent plainly and remembered, then ``compressed`` ones, and again.

    ``retrain``: learn anew as soon as, on most ranks, the relative loss of what is sent passes this many
    times what it was on the rank's own first compressed gradients; 0: never before its time.

    Raises DistcompError for fewer than 5 steps of learning, fewer than 1 of compression, or a ``retrain`` of
    at most 1 that is not 0.
    """

    learn: int = 100
    compressed: int = 400
    retrain: float = 1.5

    def __post_init__(self) -> None:
        if self.learn < 5 or self.compressed < 1:
            raise DistcompError(
                "a cycle learns for 5 steps or more and compresses for 1 or more, "
                f"not {self.learn} and {self.compressed}"
            )
        if self.retrain and self.retrain <= 1:
            raise DistcompError(f"retrain is a factor above 1, not {self.retrain}; 0 switches it off")

    @property
    def length(self) -> int:
        """Steps of a whole cycle."""
        return self.learn + self.compressed

    @property
    def watch(self) -> int:
        """Compressed steps that set the reference."""
        return max(1, min(20, self.compressed // 5))


@dataclass(frozen=True)
class Slicing:
    """A convolution's gradient (F filters of D x H x W) as slices of K consecutive elements.

    The F filters' elements at one place lie side by side, then come depth, width and height. K is a
    multiple of ``F D`` that divides the whole: the largest up to ``aim``, or ``F D`` itself where that is
    larger. A layer with ``F D > cap`` is not sliced: its basis would be too large to find and to keep.

    At most ``reuse`` slices share a basis, which is found from the first of them; 0: all of a layer do.

    Raises DistcompError for an ``aim`` outside 1..cap, or a negative ``reuse``.
    """

    aim: int = 1024
    cap: int = 4096
    reuse: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.aim <= self.cap:
            raise DistcompError(
                f"slices aim at 1 to cap={self.cap} elements, not {self.aim}; the default is 1024"
            )
        if self.reuse < 0:
            raise DistcompError(
                f"reuse counts the slices that share a basis, not {self.reuse}; 0 is all of a layer"
            )

    def length(self, param: ParamSlice) -> int | None:
        """K; None for what is no convolution, or too wide."""
        if len(param.shape) != 4 or param.numel == 0:
            return None
        filters, depth, height, width = param.shape
        unit, places = filters * depth, height * width
        if unit > self.cap:
            return None
        return unit * max(
            j for j in range(1, places + 1) if places % j == 0 and (j == 1 or j * unit <= self.aim)
        )

    def shape(self, param: ParamSlice) -> tuple[int, int, int]:
        """Bases of a layer, slices that share one, and K."""
        k = self.length(param)
        assert k is not None
        slices = param.numel // k
        bases = -(-slices // self.reuse) if self.reuse else 1
        return bases, -(-slices // bases), k


@dataclass(frozen=True)
class Unsliced(Rule):
    """What GradiVeQ does not apply to: all but convolutions, and those too wide to slice."""

    slicing: Slicing = field(default=Slicing())

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({SHAPES})

    def __call__(self, param: ParamSlice) -> bool:
        if len(param.shape) == 4 and not param.whole:
            raise DistcompError(
                f"{param.name} arrives in pieces, and gradiveq needs whole convolutions; use qsgd, topk "
                "or another method that works element by element"
            )
        return self.slicing.length(param) is None


def to_slices(piece: Tensor, param: ParamSlice, k: int) -> Tensor:
    """``[slices, K]`` in memory of its own, from a gradient that lies in a flat buffer."""
    moved = piece.view(param.shape).permute(2, 3, 1, 0)
    return moved.clone(memory_format=torch.contiguous_format).view(-1, k)


def from_slices(slices: Tensor, param: ParamSlice, out: Tensor) -> None:
    """Put slices back to where they lie in a flat buffer."""
    filters, depth, height, width = param.shape
    out.view(param.shape).copy_(slices.view(height, width, depth, filters).permute(3, 2, 0, 1))


def to_coefficients(slices: Tensor, basis: Tensor, mean: Tensor) -> Tensor:
    """``c = U^T (g - mu)``: ``[S, d]`` for slices ``[S, K]`` and bases ``[B, d, K]`` of neighbouring slices.

    Linear in (g, mu): what the ranks' parts compress to adds up to what their sum compresses to.
    """
    return torch.bmm(_shared(slices - mean, basis), basis.mT).flatten(0, 1)[: slices.shape[0]]


def from_coefficients(coefficients: Tensor, basis: Tensor, mean: Tensor) -> Tensor:
    """``U c + mu``: ``[S, K]``."""
    return torch.bmm(_shared(coefficients, basis), basis).flatten(0, 1)[: mean.shape[0]] + mean


def relative_loss(slices: Tensor, coefficients: Tensor, mean: Tensor) -> float:
    """``|g - (U c + mu)| / |g|``, without the product: U is orthonormal."""
    whole, centred, kept = (
        float(torch.linalg.vector_norm(values)) for values in (slices, slices - mean, coefficients)
    )
    # Of an orthonormal basis |U c| = |c|: what is lost is what is left of the square.
    return max(centred**2 - kept**2, 0.0) ** 0.5 / whole if whole else 0.0


def _shared(rows: Tensor, basis: Tensor) -> Tensor:
    """``[S, ...]`` as ``[B, S/B, ...]``: the rows that share a basis together, zeros after the last."""
    bases = basis.shape[0]
    share = -(-rows.shape[0] // bases)
    missing = bases * share - rows.shape[0]
    if missing:
        rows = torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])
    return rows.view(bases, share, -1)


@dataclass(frozen=True)
class Subspace:
    """How a basis is found from samples.

    ``ratio``: at most ``K / ratio`` coefficients per slice. ``loss``: as few of them as stay within this much
    (of the energy, 0.01 is 1 %) of the best that so many can do, on gradients that the basis was not found
    from. ``centred``: samples minus their mean; otherwise around zero.

    Raises DistcompError for a ratio below 1 or a loss outside [0, 1).
    """

    ratio: float = 8.0
    loss: float = 0.01
    centred: bool = True

    def __post_init__(self) -> None:
        if self.ratio < 1 or not 0 <= self.loss < 1:
            raise DistcompError(
                f"ratio={self.ratio} must be 1 or more and loss={self.loss} in [0, 1); "
                "the defaults are 8 and 0.01"
            )

    def most(self, k: int, samples: int) -> int:
        """The largest d: samples that d is chosen from cannot span more."""
        return max(1, min(int(k / self.ratio), k, samples - held_out(samples) - self.centred))

    def find(self, samples: Tensor) -> tuple[Tensor, int]:
        """How to mix samples ``[B, T, K]`` into bases, ``[B, d_max, T]`` (float64), and d, one for all of a
        layer.

        d is chosen with bases of the first four fifths, by their loss on the last fifth; the mixture returned
        is that of all samples.
        """
        # An eigensolver refuses a NaN, and a step that has one is skipped in any case.
        samples = torch.nan_to_num(samples.double(), 0.0, 0.0, 0.0)
        count, k = samples.shape[1:]
        most = self.most(k, count)
        first_fifths, last_fifth = (
            samples[:, : count - held_out(count)],
            samples[:, count - held_out(count) :],
        )
        basis = torch.bmm(self._mixture(first_fifths, most), first_fifths)
        centred = last_fifth - first_fifths.mean(1, keepdim=True) if self.centred else last_fifth
        left = centred.square().sum() - torch.bmm(centred, basis.mT).square().sum((0, 1)).cumsum(0)
        enough = left <= left[-1] + self.loss * last_fifth.square().sum()
        return self._mixture(samples, most), int(enough.int().argmax()) + 1

    def _mixture(self, samples: Tensor, most: int) -> Tensor:
        """``principal`` of what is left when the mean is taken off, in terms of the samples themselves."""
        if not self.centred:
            return principal(samples, most)
        rows = principal(samples - samples.mean(1, keepdim=True), most)
        return rows - rows.mean(-1, keepdim=True)


def held_out(samples: int) -> int:
    """The samples, the last ones, on which d is chosen."""
    return max(1, samples // 5)


def mixed(mixture: Tensor, samples: Tensor) -> Tensor:
    """The bases ``[B, d_max, K]`` that a mixture ``[B, d_max, T]`` makes of samples ``[B, T, K]``."""
    return torch.bmm(mixture, samples.double()).float()


def principal(samples: Tensor, most: int) -> Tensor:
    """Mixtures ``[B, most, T]`` of samples ``[B, T, K]`` (float64) into their leading principal directions.

    ``principal(X) X`` has orthonormal rows. By the eigenvectors of the T x T matrix of inner products: T is a
    hundred where K is thousands. Where the samples span less, zeros follow.
    """
    # Scaled by the largest magnitude: squares of small gradients would underflow, even in float64.
    largest = samples.abs().amax((1, 2), keepdim=True)
    scale = torch.where(largest > 0, largest, 1.0)
    values, vectors = torch.linalg.eigh(torch.bmm(samples / scale, samples.mT / scale))
    values, vectors = values[:, -most:].flip(-1), vectors[..., -most:].flip(-1)
    real = values > SMALLEST * values[:, :1].clamp(min=1e-300)
    factors = torch.where(real, values.clamp(min=1e-300).rsqrt(), 0.0)
    mixture: Tensor = factors.unsqueeze(-1) * vectors.mT / scale
    return mixture


SMALLEST = 1e-10
"""Directions with less than this part of the leading one's energy are rounding."""
