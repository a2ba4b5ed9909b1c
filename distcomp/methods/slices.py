"""What GradiVeQ knows and computes on one rank alone: its cycle, slices of a convolution's gradient, and the
subspace they lie in."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.kernels.subspace import Known, Sliced, squared_distances
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


PLACE, FILTER = "place", "filter"
"""What a slice is: all filters at some places, as in the paper; or one filter."""


@dataclass(frozen=True)
class Slicing:
    """A convolution's gradient (F filters of D x H x W) as slices of K elements.

    ``along="place"``, as in the paper: all filters and depths at some neighbouring places. K is a multiple
    of ``F D`` that divides the whole: the largest up to ``aim``, or ``F D`` itself where that is larger.
    ``along="filter"``: each filter is a slice of ``K = D H W``, whose basis is then one of the convolution's
    inputs; one of a single place (1 x 1) is sliced as in the paper. The order of elements within a slice is
    the one in which they lie: a basis does not care.

    A layer with K (``F D``, along places) beyond ``cap`` is not sliced: its basis would be too large to find
    and to keep. At most ``reuse`` neighbouring slices share a basis; 0: all of a layer do. It is found from
    all of them, one after the other (the paper: from the first one).

    Raises DistcompError for an ``aim`` outside 1..cap, a negative ``reuse``, or another ``along``.
    """

    aim: int = 1024
    cap: int = 4096
    reuse: int = 0
    along: str = PLACE

    def __post_init__(self) -> None:
        if not 1 <= self.aim <= self.cap:
            raise DistcompError(
                f"slices aim at 1 to cap={self.cap} elements, not {self.aim}; the default is 1024"
            )
        if self.reuse < 0:
            raise DistcompError(
                f"reuse counts the slices that share a basis, not {self.reuse}; 0 is all of a layer"
            )
        if self.along not in (PLACE, FILTER):
            raise DistcompError(f"slices lie along {PLACE} or {FILTER}, not {self.along!r}")

    def length(self, param: ParamSlice) -> int | None:
        """K; None for what is no convolution, or too wide."""
        if len(param.shape) != 4 or param.numel == 0:
            return None
        filters, depth, height, width = param.shape
        unit, places = filters * depth, height * width
        if self.along == FILTER and places > 1:
            return depth * places if depth * places <= self.cap else None
        if unit > self.cap:
            return None
        return unit * max(
            j for j in range(1, places + 1) if places % j == 0 and (j == 1 or j * unit <= self.aim)
        )

    def sliced(self, param: ParamSlice, at: int, most: int, dims: int) -> Sliced:
        """Where the slices lie in a flat buffer in which the gradient begins at ``at``."""
        k = self.length(param)
        assert k is not None
        filters, depth, height, width = param.shape
        slices = param.numel // k
        units = 1 if self.along == FILTER and height * width > 1 else filters * depth
        bases = -(-slices // self.reuse) if self.reuse else 1
        return Sliced(at, units, slices, k // units, bases, most, dims)


def sampled(one: Sliced, age: int) -> list[int]:
    """For each basis, the slice that is its sample in the learning step ``age``: each in its turn."""
    firsts = range(0, one.slices, one.share)
    return [first + age % min(one.share, one.slices - first) for first in firsts]


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


def samples_of(flat: Tensor, one: Sliced, age: int) -> Tensor:
    """``[B, K]``: the slices that a learning step remembers."""
    slices = one.view(flat)
    return torch.stack([slices[row] for row in sampled(one, age)]).view(one.bases, one.k)


def relative_losses(x: Tensor, mean: Tensor, coefficients: Tensor, known: Known, bits: int) -> Tensor:
    """``|g - (U c + mu)| / |g|`` of each layer, without the product: ``|U c| = |c|`` where U is orthonormal,
    so that what is lost is what is left of the square. What is less than rounding a basis
    to ``bits`` is not seen."""
    whole, centred = squared_distances(x, mean, known.pieces).unbind(1)
    kept = squared_distances(coefficients, coefficients, known.runs)[:, 0]
    lost = (centred - kept) / torch.where(whole > 0, whole, 1.0)
    return lost.clamp(min=UNSEEN[bits]).sqrt()


UNSEEN = {16: 2.0**-8, 32: 0.0}
"""The part of a gradient's energy that is not seen to be lost, for a basis' bits: rounded rows are
orthonormal to so much."""

DTYPES = {16: torch.bfloat16, 32: torch.float32}
"""What a basis' numbers may be."""


@dataclass(frozen=True)
class Subspace:
    """How a basis is found from samples.

    ``ratio``: at most ``K / ratio`` coefficients per slice. ``loss``: as few of them as stay within this much
    (of the energy, 0.01 is 1 %) of the best that so many can do, on gradients that the basis was not found
    from. ``centred``: samples minus their mean; otherwise around zero. ``bits``: of a basis' numbers, 16
    (bfloat16: half of what compressing reads; what is sent is the coefficients of the rounded basis) or 32.

    Raises DistcompError for a ratio below 1, a loss outside [0, 1), or other bits.
    """

    ratio: float = 8.0
    loss: float = 0.01
    centred: bool = True
    bits: int = 16

    def __post_init__(self) -> None:
        if self.bits not in DTYPES:
            raise DistcompError(f"a basis has numbers of 16 bits (bfloat16) or 32, not {self.bits}")
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
        is that of all samples. All of it is in terms of the samples' inner products, T x T of them.
        """
        # An eigensolver refuses a NaN, and a step that has one is skipped in any case.
        samples = torch.nan_to_num(samples.double(), 0.0, 0.0, 0.0)
        count, k = samples.shape[1:]
        most, products = self.most(k, count), torch.bmm(samples, samples.mT)
        return principal(products, most), self._enough(products, most)

    def _enough(self, products: Tensor, most: int) -> int:
        """d, from the inner products ``[B, T, T]`` of samples."""
        first = products.shape[1] - held_out(products.shape[1])
        basis = principal(products[:, :first, :first], most)
        kept = torch.bmm(products[:, first:, :first], basis.mT).square().sum((0, 1))
        whole = products.diagonal(dim1=1, dim2=2)[:, first:].sum()
        losses = whole - kept.cumsum(0)
        return int((losses <= losses[-1] + self.loss * whole).int().argmax()) + 1


def held_out(samples: int) -> int:
    """The samples, the last ones, on which d is chosen."""
    return max(1, samples // 5)


def mixed(mixture: Tensor, samples: Tensor, bits: int) -> Tensor:
    """The bases ``[B, d_max, K]`` that a mixture ``[B, d_max, T]`` makes of samples ``[B, T, K]``."""
    return torch.bmm(mixture, samples.double()).to(DTYPES[bits])


def principal(products: Tensor, most: int) -> Tensor:
    """Mixtures ``[B, most, T]`` of samples into their leading principal directions, from the samples' inner
    products ``X X^T``, ``[B, T, T]`` (float64).

    ``principal(X X^T) X`` has orthonormal rows. T is a hundred where K is thousands. Where the samples span
    less, zeros follow.
    """
    # Scaled by the largest: an eigensolver is exact to its rounding of that.
    largest = products.abs().amax((1, 2), keepdim=True)
    scale = torch.where(largest > 0, largest, 1.0)
    values, vectors = torch.linalg.eigh(products / scale)
    values, vectors = values[:, -most:].flip(-1), vectors[..., -most:].flip(-1)
    real = values > SMALLEST * values[:, :1].clamp(min=1e-300)
    factors = torch.where(real, values.clamp(min=1e-300).rsqrt(), 0.0)
    mixture: Tensor = factors.unsqueeze(-1) * vectors.mT / scale.sqrt()
    return mixture


SMALLEST = 1e-10
"""Directions with less than this part of the leading one's energy are rounding."""
