"""Hashed weights: numbers that share buckets, in space (HashedNets) or by frequency (FreshNets)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from distcomp.errors import DistcompError
from distcomp.parametrize.base import Tensors
from distcomp.pruning.frequency import dct_basis
from distcomp.structured.structure import Patterns, Seeded, Start, install_structures

DOMAINS = ("dct", "space")


class Hashed(Seeded):
    """A weight whose DCT coefficients (or whose numbers) share ``budget`` values, by a hash.

    ::

        V[o, i, j] = s(o, i, j) w[h(o, i, j)],    h within the buckets of the band j1 + j2 + ...
        W[o, i]    = D^T V[o, i] D                D: the orthonormal DCT-II along each dimension of the kernel

    ``w``: ``[1, budget]``, a row, as methods leave vectors alone. Bands get buckets in proportion to their
    coefficients times ``u^(a-1) (1-u)^(b-1)``, u the frequency's place in (0, 1): ``shape=(1, 1)`` for equal
    shares, ``(1, 2.5)`` for more at low frequencies. Hash and sign come from the seed and are not stored.
    Where a weight has no kernel (a dense layer), or with ``domain="space"``, all of it is one band and D is
    1: HashedNets.

    Source: Chen et al., Compressing neural networks with the hashing trick, ICML 2015, and FreshNets, KDD
    2016. We differ: a seeded generator is the hash; u is the middle of a band, so that no band's share is
    zero.
    """

    bucket: Tensor
    sign: Tensor

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        budget: int,
        *,
        domain: str = "dct",
        shape: tuple[float, float] = (1.0, 2.5),
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        if domain not in DOMAINS or min(shape) <= 0:
            raise DistcompError(
                f"hashing has a domain of {DOMAINS} and a positive shape, not {domain}, {shape}"
            )
        kernel = weight_shape[2:] if domain == "dct" else ()
        self.weight_shape = tuple(weight_shape)
        self.kernel = tuple(size for size in kernel if size > 1)
        bands = (
            _bands(tuple(kernel)).expand(weight_shape)
            if kernel
            else torch.zeros(weight_shape, dtype=torch.int64)
        )
        counts = torch.bincount(bands.flatten())
        if not len(counts) <= budget <= bands.numel():
            raise DistcompError(
                f"{budget} values cannot describe a weight of {bands.numel()} numbers in "
                f"{len(counts)} bands; "
                f"choose {len(counts)} to {bands.numel()}"
            )
        self.sizes = shares(counts.tolist(), budget, *shape)
        self.register_buffer("band", bands.contiguous(), persistent=False)
        self.register_buffer("bucket", torch.zeros(weight_shape, dtype=torch.int64), persistent=False)
        self.register_buffer("sign", torch.zeros(weight_shape, dtype=torch.float32), persistent=False)
        self.draw()

    def draw(self) -> None:
        band: Tensor = self.band  # type: ignore[assignment]
        sizes = torch.tensor(self.sizes, dtype=torch.int64)
        first = sizes.cumsum(0) - sizes
        uniform = torch.rand(self.weight_shape, generator=self.key("bucket").generator(), dtype=torch.float64)
        own = band.cpu()
        self.bucket.copy_(first[own] + (uniform * sizes[own]).long())
        self.sign.copy_(2.0 * torch.randint(2, self.weight_shape, generator=self.key("sign").generator()) - 1)

    def decode(self, w: Tensor) -> Tensor:
        """The weight: looked up, signed, and transformed back."""
        return self._transformed(w[0][self.bucket] * self.sign.to(w.dtype), back=True)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The mean of each bucket's coefficients, signs undone: the nearest, as the transform is a
        rotation."""
        coefficients = self._transformed(weight.double(), back=False) * self.sign
        sums = torch.zeros(sum(self.sizes), dtype=torch.float64, device=weight.device)
        sums.index_add_(0, self.bucket.flatten(), coefficients.flatten())
        return (sums / self._members()).to(weight.dtype)[None]

    def fresh(self, *theta: Tensor) -> Tensors:
        """The mean of m independent numbers has 1/m of their variance."""
        return (theta[0] * self._members().sqrt().to(theta[0]),)

    def _members(self) -> Tensor:
        return torch.bincount(self.bucket.flatten(), minlength=sum(self.sizes)).clamp(min=1)

    def _transformed(self, kernels: Tensor, back: bool) -> Tensor:
        if not self.kernel:
            return kernels
        for dim in range(2, kernels.dim()):
            basis = dct_basis(kernels.shape[dim]).to(kernels)
            kernels = torch.tensordot(kernels, basis if back else basis.T, dims=([dim], [0])).movedim(-1, dim)
        return kernels


def _bands(kernel: tuple[int, ...]) -> Tensor:
    """``j1 + j2 + ...`` of each coefficient."""
    bands = torch.zeros(kernel, dtype=torch.int64)
    for dim, size in enumerate(kernel):
        bands += torch.arange(size).view(-1, *(1 for _ in kernel[dim + 1 :]))
    return bands


def shares(counts: list[int], budget: int, a: float, b: float) -> list[int]:
    """How many of ``budget`` buckets each band has: at least 1, at most its coefficients, and all are
    given."""
    if len(counts) == 1:
        return [budget]
    places = [(band + 0.5) / len(counts) for band in range(len(counts))]
    wanted = [count * u ** (a - 1) * (1 - u) ** (b - 1) for count, u in zip(counts, places, strict=True)]
    sizes = [1] * len(counts)
    for _ in range(budget - len(counts)):
        # The next bucket goes where most is missing (Sainte-Lague's rule), never above a band's coefficients.
        sizes[
            max(
                (band for band in range(len(counts)) if sizes[band] < counts[band]),
                key=lambda band: wanted[band] / (2 * sizes[band] + 1),
            )
        ] += 1
    return sizes


def hashed(
    model: nn.Module,
    compression: float = 16.0,
    *,
    domain: str = "dct",
    shape: tuple[float, float] = (1.0, 2.5),
    layers: Patterns = None,
    start: Start = "nearest",
    seed: int = 0,
) -> nn.Module:
    """Let the numbers of a weight share ``1 / compression`` as many values by a hash: FreshNets for
    convolutions, HashedNets for dense layers and with ``domain="space"``.

    ``shape``: of the bands' budgets, see :class:`Hashed`. ``start``: as for
    :func:`distcomp.structured.circulant`. Call it before the optimizer and DistributedDataParallel are made.
    Wire: a short dense vector for each layer, which goes through any codec. Returns the model.

    Raises DistcompError for a compression below 1 and what :class:`Hashed` refuses.
    """
    if compression < 1:
        raise DistcompError(f"hashing makes a weight 1 or more times smaller, not {compression}")

    def make(layer: nn.Module, weight: Tensor) -> Hashed:
        kernel = weight.shape[2:] if domain == "dct" else ()
        bands = sum(size - 1 for size in kernel) + 1
        budget = max(bands, math.ceil(weight.numel() / compression))
        structure = Hashed(tuple(weight.shape), budget, domain=domain, shape=shape, seed=seed + len(made))
        made.append(budget)
        return structure

    made: list[int] = []
    return install_structures(model, layers, make, start)
