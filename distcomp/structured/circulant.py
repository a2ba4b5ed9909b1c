"""Block-circulant weights (CirCNN), and one circulant after a sign flip (circulant projections)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from distcomp.errors import DistcompError
from distcomp.parametrize.base import Tensors
from distcomp.structured.structure import (
    Patterns,
    Seeded,
    Start,
    convolved,
    install_structures,
    plain_geometry,
    wide,
)

SMALLEST_FFT_BLOCK = {"linear": 256, "convolution": 8}
"""From which block on ``fft="auto"`` takes the FFT: measured by ``benchmarks/structured_speed.py``."""

FFT = bool | Literal["auto"]


class BlockCirculant(Seeded):
    """A weight ``[out, in, *taps]`` of square circulant blocks of size b, at each tap of its own.

    ::

        W[i, j, t] = s[j] c[i // b, j // b, (i - j) mod b, t]         c: [ceil(out/b), ceil(in/b), b, *taps]

    Where b divides neither dimension, blocks at the edge are cut off. ``signs``: s is +-1, drawn from the
    seed, otherwise 1. One block of size ``max(out, in)`` with signs is Cheng's circulant projection.

    :meth:`compute`: a block times a vector is a circular convolution, ``irfft(rfft(c) rfft(x))``, in float32
    at least. In a convolution the transform runs along the channels, and each frequency is a group of it.

    Source: Ding et al., CirCNN, MICRO 2017; Cheng et al., ICCV 2015. We differ: blocks at the edges are cut,
    so any shape will do; where FFTs are slower, the weight is made by index and multiplied.
    """

    index: Tensor
    signs: Tensor

    def __init__(
        self, shape: tuple[int, ...], block: int, *, signs: bool = False, fft: FFT = "auto", seed: int = 0
    ) -> None:
        super().__init__(seed)
        if block < 1:
            raise DistcompError(f"a circulant block has 1 row or more, not {block}; 8 is usual")
        self.shape, self.block, self.flips, self.fft = tuple(shape), block, signs, fft
        rows, columns = torch.arange(shape[0])[:, None], torch.arange(shape[1])[None]
        self.blocks = (-(-shape[0] // block), -(-shape[1] // block))
        which = (rows // block) * self.blocks[1] + columns // block
        self.register_buffer("index", which * block + (rows - columns) % block, persistent=False)
        self.register_buffer("signs", torch.ones(shape[1], dtype=torch.float32), persistent=False)
        self.draw()

    def draw(self) -> None:
        if self.flips:
            drawn = torch.randint(2, (self.shape[1],), generator=self.key("signs").generator())
            self.signs.copy_(2.0 * drawn - 1)

    def decode(self, c: Tensor) -> Tensor:
        """The weight, by index."""
        weight = c.flatten(0, 2)[self.index]
        return weight * self._flips(weight) if self.flips else weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The mean of each wrapped diagonal, signs undone: the nearest in the sense of least squares."""
        flat = (weight * self._flips(weight) if self.flips else weight).flatten(0, 1)
        index = self.index.flatten()
        sums = torch.zeros(
            (*self.blocks, self.block, *self.shape[2:]), dtype=torch.float64, device=weight.device
        )
        sums.flatten(0, 2).index_add_(0, index, flat.double())
        means = sums.flatten(0, 2) / self._members().view(-1, *(1 for _ in self.shape[2:]))
        return means.view_as(sums).to(weight.dtype)

    def fresh(self, *theta: Tensor) -> Tensors:
        """The mean of m independent numbers has 1/m of their variance."""
        members = self._members().view(*self.blocks, self.block, *(1 for _ in self.shape[2:]))
        return (theta[0] * members.sqrt().to(theta[0]),)

    def _members(self) -> Tensor:
        return torch.bincount(
            self.index.flatten(), minlength=self.blocks[0] * self.blocks[1] * self.block
        ).clamp(min=1)

    def _flips(self, like: Tensor) -> Tensor:
        return self.signs.to(like.dtype).view(1, -1, *(1 for _ in self.shape[2:]))

    # ------------------------------------------------------------- computing without the weight

    def transforms(self, layer: nn.Module) -> bool:
        """Whether a layer multiplies by FFT."""
        smallest = SMALLEST_FFT_BLOCK["linear" if isinstance(layer, nn.Linear) else "convolution"]
        wanted = self.block >= smallest if self.fft == "auto" else self.fft
        return bool(wanted) and self.block > 1 and plain_geometry(layer)

    def compute(self, layer: nn.Module, x: Tensor, *theta: Tensor) -> Tensor | None:
        """By FFT, where it pays."""
        if not self.transforms(layer) or not x.numel():  # there is no FFT of nothing
            return None
        by_fft = self._linear if isinstance(layer, nn.Linear) else self._convolution
        return by_fft(layer, x, theta[0])

    def _linear(self, layer: Any, x: Tensor, c: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``."""
        flipped = x * self.signs.to(x.dtype) if self.flips else x
        padded = nn.functional.pad(wide(flipped), (0, self.blocks[1] * self.block - self.shape[1]))
        inputs = torch.fft.rfft(padded.view(-1, self.blocks[1], self.block))  # [n, q, f]
        # One product of matrices for each frequency: [f, n, q] [f, q, p].
        products = inputs.permute(2, 0, 1) @ torch.fft.rfft(wide(c)).permute(2, 1, 0)
        outputs = torch.fft.irfft(products.permute(1, 2, 0), n=self.block)
        y: Tensor = outputs.reshape(*x.shape[:-1], -1)[..., : self.shape[0]].to(x.dtype)
        return y if layer.bias is None else torch.add(y, layer.bias)

    def _convolution(self, layer: Any, x: Tensor, c: Tensor) -> Tensor:
        """``[n, in, *space] -> [n, out, *space]``: real and imaginary parts of a frequency are one group."""
        if x.dim() == c.dim() - 2:  # an example without a batch around it
            return self._convolution(layer, x[None], c)[0]
        (p, q), b, space = self.blocks, self.block, x.shape[2:]
        flipped = x * self._flips(x)[..., 0].view(1, -1, *(1 for _ in space)) if self.flips else x
        padded = nn.functional.pad(wide(flipped), (0, 0) * len(space) + (0, q * b - self.shape[1]))
        inputs = torch.fft.rfft(padded.view(-1, q, b, *space), dim=2).transpose(1, 2)  # [n, f, q, *space]
        frequencies = inputs.shape[1]
        parts = torch.cat([inputs.real, inputs.imag], 2).flatten(1, 2)
        kernel = torch.fft.rfft(wide(c), dim=2).movedim(2, 0)  # [f, p, q, *taps]
        real, imaginary = kernel.real, kernel.imag
        rows = torch.cat([torch.cat([real, -imaginary], 2), torch.cat([imaginary, real], 2)], 1)
        convolved_parts = convolved(parts, rows.flatten(0, 1), layer, groups=frequencies)
        y = convolved_parts.view(-1, frequencies, 2, p, *convolved_parts.shape[2:])
        spectrum = torch.complex(y[:, :, 0].contiguous(), y[:, :, 1].contiguous()).transpose(1, 2)
        channels = torch.fft.irfft(spectrum, n=b, dim=2).flatten(1, 2)
        outputs: Tensor = channels[:, : self.shape[0]].to(x.dtype)
        if layer.bias is None:
            return outputs
        return torch.add(outputs, layer.bias.view(-1, *(1 for _ in space)))

    def multiplications(self, layer: nn.Module, positions: int) -> int | None:
        """Four for each complex one, and ``2 b log2 b`` for a transform of b numbers."""
        if not self.transforms(layer):
            return None
        (p, q), b = self.blocks, self.block
        taps = self.index.new_tensor(self.shape[2:]).prod().item() if self.shape[2:] else 1
        products = 4 * (b // 2 + 1) * p * q * int(taps) * positions
        return products + 2 * b * max(1, (b - 1).bit_length()) * (p + q) * positions


def circulant(
    model: nn.Module,
    block: int | None = 8,
    *,
    signs: bool = False,
    fft: FFT = "auto",
    layers: Patterns = None,
    start: Start = "nearest",
    seed: int = 0,
) -> nn.Module:
    """Describe weights by circulant blocks: ``block`` times fewer numbers are trained, exchanged and saved.

    ``block=None`` with ``signs=True``: one circulant for each layer after a fixed random sign flip (Cheng
    2015),
    ``max(out, in)`` numbers a layer. ``start="nearest"`` converts a trained model, ``"variance"`` a fresh
    one.
    ``fft``: whether to compute by FFT, or ``"auto"``. See :class:`BlockCirculant`.

    Call it before the optimizer and DistributedDataParallel are made. Wire: what its method makes of
    ``1/block`` of the numbers. Returns the model.

    Raises DistcompError for a block below 1, patterns that name no layer, layers that have a structure.
    """
    if fft not in (True, False, "auto"):
        raise DistcompError(f"fft is True, False or 'auto', not {fft!r}")

    def make(layer: nn.Module, weight: Tensor) -> BlockCirculant:
        size = max(weight.shape[:2]) if block is None else block
        return BlockCirculant(tuple(weight.shape), size, signs=signs, fft=fft, seed=seed)

    return install_structures(model, layers, make, start)
