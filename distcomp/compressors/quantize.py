"""QSGD: each block of values as small integers and one scale."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp import kernels
from distcomp.compressors.base import Compressor, register_compressor
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.payload import Part, Parts, Payload
from distcomp.randomness import Key


@register_compressor("quantize")
@dataclass(frozen=True)
class Quantize(Compressor):
    """Round each value to one of ``2s+1`` levels of its block, at random so that the mean is right.

    For a block ``v`` of ``block`` values and ``s = 2^(bits-1) - 1`` levels on either side of zero::

        C(v)_k = |v| / s * sign(v_k) * xi_k,    xi_k in {l, l+1},    l = floor(s |v_k| / |v|),
        E[xi_k] = s |v_k| / |v|

    where ``|v|`` is the largest magnitude (``norm="max"``) or the Euclidean norm (``norm="l2"``). With
    ``bits=1`` there is no room for a zero: ``C(v)_k = sign(v_k) * mean|v|`` (sign(0) = +1), which is biased
    and needs error feedback.

    ``bits`` is the whole width of a value on the wire, sign included, and values are packed: a block of 512
    at 3 bits takes 192 bytes. On the wire: ``bits/8`` bytes per value and 4 bytes per block. A block whose
    scale is below ``2^-120`` is sent as zeros.

    Source: Alistarh et al., "QSGD", NeurIPS 2017, section 3 and the practical variant of section 4 (blocks,
    max norm, fixed-width codes); one bit: Karimireddy et al., "Error feedback fixes SignSGD", ICML 2019. We
    differ: the paper's *s* counts levels without the sign and its codes are Elias-coded; here ``bits`` counts
    all.

    Raises DistcompError for bits outside 1..8, a block below 1, or an unknown norm or rounding.
    """

    bits: int = 4
    block: int = 512
    norm: str = "max"
    rounding: str = "stochastic"
    plain: tuple[str, ...] = ()
    """Roles of parameters that travel in the same payload as float32, uncompressed."""

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise DistcompError(f"qsgd packs 1 to 8 bits per value, not {self.bits}; use bf16 for more")
        if self.block < 1:
            raise DistcompError(f"a block holds at least one value, not {self.block}; the default is 512")
        if self.norm not in ("max", "l2"):
            raise DistcompError(f"qsgd knows the norms max and l2, not {self.norm!r}")
        if self.rounding not in ("stochastic", "nearest"):
            raise DistcompError(f"qsgd rounds stochastic or nearest, not {self.rounding!r}")

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return self.bits > 1 and self.rounding == "stochastic"

    @property
    def alignment(self) -> int:  # type: ignore[override]
        return self.block

    @property
    def levels(self) -> int:
        """Levels on either side of zero."""
        return (1 << (self.bits - 1)) - 1

    def parts(self, layout: Layout) -> Parts:
        plain, code_bytes, scales = 0, 0, 0
        for param in layout.slices:
            if param.role in self.plain:
                plain += param.numel
            else:
                code_bytes += kernels.packed_bytes(param.numel, self.block, self.bits)
                scales += kernels.scale_count(param.numel, self.block)
        first = (Part("plain", torch.float32, plain),) if self.plain else ()
        return (*first, Part("scales", torch.float32, scales), Part("codes", torch.uint8, code_bytes))

    def _views(self, payload: Payload, layout: Layout) -> Iterator[tuple[Tensor, Tensor]]:
        """The codes and scales of each segment; of a plain one its values, and no scales."""
        plain_at = code_at = scale_at = 0
        codes, scales = payload["codes"], payload["scales"]
        for param in layout.slices:
            if param.role in self.plain:
                yield payload["plain"][plain_at : plain_at + param.numel], scales[:0]
                plain_at += param.numel
                continue
            code_stop = code_at + kernels.packed_bytes(param.numel, self.block, self.bits)
            scale_stop = scale_at + kernels.scale_count(param.numel, self.block)
            yield codes[code_at:code_stop], scales[scale_at:scale_stop]
            code_at, scale_at = code_stop, scale_stop

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        payload = Payload.empty(self.parts(layout), x.device)
        given = self.bits > 1 and self.norm == "l2"
        for (param, piece), (codes, scales) in zip(
            layout.pieces(x), self._views(payload, layout), strict=True
        ):
            if param.role in self.plain:
                codes.copy_(piece)
                continue
            if given:
                scales.copy_(_block_l2(piece, self.block))
            kernels.quantize(
                piece,
                codes,
                scales,
                block=self.block,
                bits=self.bits,
                key=key.fold(param.name).bits,
                first=param.start,
                stochastic=self.rounding == "stochastic",
                given_scales=given,
            )
        return payload

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        self._decode(out, payload, layout, add=add)

    def subtract_from(self, out: Tensor, payload: Payload, layout: Layout) -> None:
        self._decode(out, payload, layout, subtract=True)

    def _decode(
        self, out: Tensor, payload: Payload, layout: Layout, add: bool = False, subtract: bool = False
    ) -> None:
        for (param, piece), (codes, scales) in zip(
            layout.pieces(out), self._views(payload, layout), strict=True
        ):
            if param.role not in self.plain:
                kernels.dequantize(
                    codes, scales, piece, block=self.block, bits=self.bits, add=add, subtract=subtract
                )
            elif subtract:
                piece.sub_(codes)
            elif add:
                piece.add_(codes)
            else:
                piece.copy_(codes)

    def omega(self, numel: int) -> float | None:
        """``min(B/s^2, sqrt(B)/s)`` for the Euclidean norm (Lemma 3.1); ``(sqrt(1 + (B-1)/s^2) - 1) / 2`` for
        the max norm, which blocks reach: see :func:`worst_variance`."""
        if not self.unbiased:
            return None
        length = max(1, min(self.block, numel))
        if self.norm == "max":
            return worst_variance(length, 1 / self.levels)
        return min(length / self.levels**2, math.sqrt(length) / self.levels)

    def delta(self, numel: int) -> float | None:
        """One bit: ``|v|_1^2 / (B |v|_2^2) >= 1/B``. To nearest with the max norm: ``1 / (1 + (B-1)/(4
        s^2))``, which all values but the largest just below half a level reach."""
        length = max(1, min(self.block, numel))
        if self.bits == 1:
            return 1 / length
        if self.rounding == "nearest" and self.norm == "max":
            # The largest value has no error. Of another, the error is v up to half a level and no more than
            # half a level above: per square of v it is greatest at half a level.
            return 1 / (1 + (length - 1) / (4 * self.levels**2))
        return super().delta(numel)


def worst_variance(length: int, lowest: float) -> float:
    """The largest ``E|C(v)-v|^2 / |v|^2`` of unbiased rounding to levels of the largest magnitude of a block.

    ``(sqrt(1 + (B-1) l^2) - 1) / 2`` for B values and the lowest level above zero at ``l`` times the largest
    magnitude, provided that rounding between two levels above zero errs by no more than that.

    Proof. Let the largest magnitude be 1: it is a level and has no error. The variance of another value v
    below l is ``v (l - v)``. For any w >= 0, ``v (l - v) - w v^2 <= l^2 / (4 (1 + w))``, with equality at
    ``v = l / (2 (1 + w))``; between higher levels of equal distance l the difference is smaller. So the sum
    of the variances less w times the sum of squares is at most ``(B-1) l^2 / (4 (1 + w)) - w``, which is zero
    at the w above: no block exceeds it, and one with all other values at that v reaches it.
    """
    return (math.sqrt(1 + (length - 1) * lowest**2) - 1) / 2


def _block_l2(x: Tensor, block: int) -> Tensor:
    """The Euclidean norm of each block."""
    blocks = -(-x.numel() // block)
    padded = torch.zeros(blocks * block, dtype=x.dtype, device=x.device)
    padded[: x.numel()] = x
    rows = padded.view(blocks, block)
    largest = rows.abs().amax(1)
    unit = torch.where(largest > 0, largest, torch.ones_like(largest))
    # Squares of the values themselves over- and underflow.
    norms: Tensor = torch.linalg.vector_norm(rows / unit[:, None], dim=1) * largest
    return norms
