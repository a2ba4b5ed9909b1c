"""Weights as products of factors: SVD, Tucker-2, CP."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from distcomp.errors import DistcompError
from distcomp.parametrize.base import Tensors
from distcomp.structured.ranks import Rank, chosen_rank
from distcomp.structured.structure import (
    Patterns,
    Structure,
    convolved,
    install_structures,
    plain_geometry,
    wide,
)

LETTERS = "abcdefgh"


class Factorized(Structure):
    """What factors have in common: the layer computes with them one after the other, where it can."""

    shape: tuple[int, ...]

    def pays(self, layer: nn.Module) -> bool:
        """Whether a layer computes with the factors: those take fewer multiplications than the weight."""
        return plain_geometry(layer) and self.each_position() < math.prod(self.shape)

    def each_position(self) -> int:
        """Multiplications for one position of the output."""
        raise NotImplementedError

    def multiplications(self, layer: nn.Module, positions: int) -> int | None:
        return self.each_position() * positions if self.pays(layer) else None


class SVD(Factorized):
    """``W[o, ...] = sum_r left[o, r] right[r, ...]``: theta is ``left [out, r]``, ``right [r, in, *taps]``.

    Two layers without anything between: r filters, then a mix of them. The nearest of its rank is the
    truncated singular value decomposition (Eckart and Young), ``U sqrt(S)`` and ``sqrt(S) V^T``.
    """

    def __init__(self, shape: tuple[int, ...], rank: int) -> None:
        super().__init__()
        self.shape, self.rank = tuple(shape), min(rank, shape[0], math.prod(shape[1:]))

    def decode(self, left: Tensor, right: Tensor) -> Tensor:
        """``left right``."""
        return (left @ right.flatten(1)).view(self.shape)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The truncated singular value decomposition."""
        u, s, v = torch.linalg.svd(wide(weight).flatten(1), full_matrices=False)
        root = s[: self.rank].sqrt()
        left, right = u[:, : self.rank] * root, root[:, None] * v[: self.rank]
        return left.to(weight.dtype), right.view(-1, *self.shape[1:]).to(weight.dtype)

    def each_position(self) -> int:
        return self.rank * (self.shape[0] + math.prod(self.shape[1:]))

    def compute(self, layer: nn.Module, x: Tensor, *theta: Tensor) -> Tensor | None:
        if not self.pays(layer):
            return None
        left, right = theta
        bias: Any = layer.bias
        if isinstance(layer, nn.Linear):
            return nn.functional.linear(nn.functional.linear(x, right), left, bias)
        mix = left.view(*left.shape, *(1 for _ in self.shape[2:]))
        return convolved(convolved(x, right, layer), mix, bias=bias)


class Tucker2(Factorized):
    """``W[o, i, t] = sum_pq outer[o, p] core[p, q, t] inner[i, q]``: a 1x1, a small, and a 1x1 convolution.

    theta: ``outer [out, p]``, ``core [p, q, *taps]``, ``inner [in, q]``. ``right_inverse``: singular vectors
    of the two unfoldings (HOSVD), then orthogonal iteration until the energy of the core no longer grows, at
    most 25 times: the nearest that this reaches, not less near than HOSVD.

    Source: Kim et al., Compression of deep convolutional neural networks for fast and low power mobile
    applications, ICLR 2016. We differ: the orthogonal iteration.
    """

    ROUNDS = 25

    def __init__(self, shape: tuple[int, ...], ranks: tuple[int, int]) -> None:
        super().__init__()
        taps = math.prod(shape[2:])
        self.shape = tuple(shape)
        self.ranks = (min(ranks[0], shape[0], shape[1] * taps), min(ranks[1], shape[1], shape[0] * taps))

    def decode(self, outer: Tensor, core: Tensor, inner: Tensor) -> Tensor:
        """The weight."""
        return torch.einsum("op,pq...,iq->oi...", outer, core, inner)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """HOSVD, then orthogonal iteration."""
        w = wide(weight).flatten(2)
        inner = _leading(w.transpose(0, 1).flatten(1), self.ranks[1])
        outer = _leading(w.flatten(1), self.ranks[0])
        energy = 0.0
        for _ in range(self.ROUNDS):
            core = torch.einsum("oit,op,iq->pqt", w, outer, inner)
            grown = float(core.square().sum())
            if grown <= energy * (1 + 1e-7):
                break
            energy, kept = grown, (outer, core, inner)
            outer = _leading(torch.einsum("oit,iq->oqt", w, inner).flatten(1), self.ranks[0])
            inner = _leading(torch.einsum("oit,op->ipt", w, outer).flatten(1), self.ranks[1])
        else:
            kept = (outer, torch.einsum("oit,op,iq->pqt", w, outer, inner), inner)
        if energy == 0.0:  # a weight of zeros
            kept = (outer, torch.einsum("oit,op,iq->pqt", w, outer, inner), inner)
        outer, core, inner = (factor.to(weight.dtype) for factor in kept)
        return outer, core.view(*core.shape[:2], *self.shape[2:]), inner

    def each_position(self) -> int:
        (p, q), taps = self.ranks, math.prod(self.shape[2:])
        return q * self.shape[1] + p * q * taps + p * self.shape[0]

    def compute(self, layer: nn.Module, x: Tensor, *theta: Tensor) -> Tensor | None:
        if not self.pays(layer):
            return None
        outer, core, inner = theta
        ones = tuple(1 for _ in self.shape[2:])
        squeezed = convolved(x, inner.T.reshape(-1, self.shape[1], *ones))
        bias: Any = layer.bias
        return convolved(convolved(squeezed, core, layer), outer.view(*outer.shape, *ones), bias=bias)


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """The first left singular vectors ``[rows, rank]``."""
    vectors: Tensor = torch.linalg.svd(matrix, full_matrices=False)[0]
    return vectors[:, :rank]


class CP(Factorized):
    """``W[i1, ..., id] = sum_r f1[i1, r] ... fd[id, r]``: one factor for each dimension of the weight.

    A convolution becomes a 1x1, one convolution along each dimension of space, channel by channel, and a 1x1.
    ``right_inverse``: alternating least squares in float64 from the singular vectors of the unfoldings; the
    nearest that this reaches (the nearest of all is hard to find, and may not exist). Of a matrix it is the
    SVD.

    Source: Hitchcock 1927; Lebedev et al., Speeding-up convolutional neural networks using fine-tuned
    CP-decomposition, ICLR 2015. AccNet stacks such layers (:mod:`distcomp.blocks.accnet`).
    """

    ROUNDS = 200

    def __init__(self, shape: tuple[int, ...], rank: int) -> None:
        super().__init__()
        self.shape, self.rank = tuple(shape), rank

    def decode(self, *factors: Tensor) -> Tensor:
        """The weight."""
        terms = ",".join(f"{letter}z" for letter in LETTERS[: len(factors)])
        return torch.einsum(f"{terms}->{LETTERS[: len(factors)]}", *factors)

    def right_inverse(self, weight: Tensor) -> Tensors:
        """Alternating least squares, until the error falls by less than a millionth of the weight's
        energy."""
        w = weight.double()
        factors = [self._start(_unfolded(w, dim)) for dim in range(w.dim())]
        error, total = math.inf, float(w.square().sum())
        for _ in range(self.ROUNDS):
            for dim in range(w.dim()):
                others = [factor for position, factor in enumerate(factors) if position != dim]
                gram = torch.ones(self.rank, self.rank, dtype=w.dtype, device=w.device)
                for factor in others:
                    gram = gram * (factor.T @ factor)
                products = _khatri_rao(others)
                factors[dim] = _unfolded(w, dim) @ products @ torch.linalg.pinv(gram, hermitian=True)
            after = float((self.decode(*factors) - w).square().sum())
            if error - after <= 1e-6 * total:
                break
            error = after
        return tuple(factor.to(weight.dtype) for factor in _balanced(factors))

    def _start(self, unfolded: Tensor) -> Tensor:
        """Singular vectors; where the dimension is too small for as many, further ones drawn from a seed."""
        vectors = _leading(unfolded, self.rank)
        missing = self.rank - vectors.shape[1]
        draw = torch.Generator().manual_seed(unfolded.shape[0])
        more = torch.randn(unfolded.shape[0], missing, generator=draw, dtype=torch.float64)
        return torch.cat([vectors, more.to(vectors)], 1)

    def each_position(self) -> int:
        return self.rank * sum(self.shape)

    def pays(self, layer: nn.Module) -> bool:
        """As of the others; a stride or padding is taken along one dimension at a time."""
        return super().pays(layer) and not isinstance(getattr(layer, "padding", 0), str)

    def compute(self, layer: nn.Module, x: Tensor, *theta: Tensor) -> Tensor | None:
        if not self.pays(layer):
            return None
        bias: Any = layer.bias
        outer, inner, along = theta[0], theta[1], theta[2:]
        if isinstance(layer, nn.Linear):
            return nn.functional.linear(nn.functional.linear(x, inner.T), outer, bias)
        dims = len(along)
        ones = (1,) * dims
        y = convolved(x, inner.T.reshape(self.rank, -1, *ones))
        for dim, factor in enumerate(along):
            kernel = factor.T.reshape(
                self.rank, 1, *(factor.shape[0] if d == dim else 1 for d in range(dims))
            )
            y = convolved(y, kernel, _Along(layer, dim, dims), groups=self.rank)
        return convolved(y, outer.view(*outer.shape, *ones), bias=bias)


class _Along:
    """A layer's stride, padding and dilation along one dimension, and none along the others."""

    def __init__(self, layer: Any, dim: int, dims: int) -> None:
        def along(values: tuple[int, ...], other: int) -> tuple[int, ...]:
            return tuple(values[d] if d == dim else other for d in range(dims))

        self.stride, self.padding = along(layer.stride, 1), along(layer.padding, 0)
        self.dilation = along(layer.dilation, 1)


def _unfolded(tensor: Tensor, dim: int) -> Tensor:
    return tensor.movedim(dim, 0).flatten(1)


def _khatri_rao(factors: list[Tensor]) -> Tensor:
    """``[n1 n2 ..., r]``: the products of all rows, the last factor's index running fastest."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, None] * factor[None]).flatten(0, 1)
    return product


def _balanced(factors: list[Tensor]) -> list[Tensor]:
    """The same product, with columns of one length in all factors: none learns faster than another."""
    norms = torch.stack([factor.norm(dim=0) for factor in factors])
    common = norms.clamp(min=1e-300).log().mean(0).exp() * (norms > 0).all(0)
    return [factor / norm.clamp(min=1e-300) * common for factor, norm in zip(factors, norms, strict=True)]


def low_rank(
    model: nn.Module,
    rank: Rank | tuple[Rank, Rank] = "evbmf",
    *,
    layers: Patterns = None,
    kind: str = "tucker2",
) -> nn.Module:
    """Describe weights by factors, nearest to what they are: Tucker-2 for convolutions, SVD for dense layers.

    ``rank``: a number of components, a share of the energy such as 0.9, or ``"evbmf"``; two of them for the
    output and the input of Tucker-2. ``kind``: for convolutions ``"tucker2"``, ``"svd"`` or ``"cp"`` (a
    number of components). The model's first convolution (few inputs) and 1x1 kernels get the SVD. With a
    share or ``"evbmf"``, a layer whose factors would be no fewer numbers than its weight stays as it is.

    This is the one-shot scheme of Kim et al. 2016: decompose a trained model, then train on for an epoch or a
    few, at a quarter to a tenth of the learning rate. A layer computes with its factors while nothing else
    stands on its weight. Call it before the optimizer and DistributedDataParallel are made. Returns the
    model.

    Raises DistcompError for another kind, a rank that is none, or a number of components that saves nothing.
    """
    if kind not in ("tucker2", "svd", "cp"):
        raise DistcompError(f"a convolution is factored by 'tucker2', 'svd' or 'cp', not {kind!r}")
    if kind == "cp" and not (isinstance(rank, int) and rank > 0):
        raise DistcompError(f"CP takes a number of components, not {rank!r}; give rank=8, say")
    first = next((part for part in model.modules() if hasattr(part, "kernel_size")), None)

    def make(layer: nn.Module, weight: Tensor) -> Structure | None:
        by_svd = weight[0, 0].numel() == 1 or (layer is first and kind == "tucker2") or kind == "svd"
        structure = svd_of(weight, rank) if by_svd else _convolution(weight, rank, kind)
        return structure if _smaller(structure, weight, rank) else None

    return install_structures(model, layers, make)


def svd_of(weight: Tensor, rank: Rank | tuple[Rank, Rank]) -> SVD:
    """The structure of a weight at the rank that is wanted; of two the smaller."""
    matrix = wide(weight).flatten(1)
    values = torch.linalg.svdvals(matrix)
    each = rank if isinstance(rank, tuple) else (rank,)
    return SVD(
        tuple(weight.shape), min(chosen_rank(values, len(matrix), matrix.shape[1], one) for one in each)
    )


def _convolution(weight: Tensor, rank: Rank | tuple[Rank, Rank], kind: str) -> Structure:
    if kind == "cp":
        assert isinstance(rank, int)
        return CP(tuple(weight.shape), rank)
    outer, inner = rank if isinstance(rank, tuple) else (rank, rank)
    w = wide(weight)
    unfoldings = [(_unfolded(w, 0), outer), (_unfolded(w, 1), inner)]
    chosen = [
        chosen_rank(torch.linalg.svdvals(matrix), len(matrix), matrix.shape[1], one)
        for matrix, one in unfoldings
    ]
    return Tucker2(tuple(weight.shape), (chosen[0], chosen[1]))


def _smaller(structure: Structure, weight: Tensor, rank: Rank | tuple[Rank, Rank]) -> bool:
    theta = structure.right_inverse(weight.new_zeros(weight.shape))
    numbers = sum(tensor.numel() for tensor in ((theta,) if isinstance(theta, Tensor) else theta))
    if numbers < weight.numel():
        return True
    asked = rank if isinstance(rank, tuple) else (rank,)
    if all(isinstance(one, int) for one in asked):
        raise DistcompError(
            f"factors of rank {rank} are {numbers} numbers, the weight {list(weight.shape)} has "
            f"{weight.numel()}; "
            "choose a smaller rank, or leave the layer out of layers="
        )
    return False
