"""QSGD: each block of values as small integers and one scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.compressors.base import Compressor, register_compressor
from distcomp.errors import DistcompError
from distcomp.kernels import memory
from distcomp.kernels import pieces as many
from distcomp.kernels.dispatch import served_by_c
from distcomp.kernels.pieces import Moves, Pieces
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
    at 3 bits takes 192 bytes. On the wire: ``bits/8`` bytes per value and 4 bytes per block; the payload:
    ``scales``, float32, one a block, ``codes``, uint8, and ``plain``, float32, where there is any. A block
    whose scale is below ``2^-120`` is sent as zeros.

    Source: Alistarh et al., "QSGD", NeurIPS 2017, section 3 and the practical variant of section 4 (blocks,
    max norm, fixed-width codes); one bit: Karimireddy et al., "Error feedback fixes SignSGD", ICML 2019. We
    differ: the paper's *s* counts levels without the sign and its codes are Elias-coded; here ``bits`` counts
    all. (GRACE's is ``norm="l2"`` of whole bytes. CGX's range is from the smallest to the largest value of a
    block, with ``2^bits`` levels, of which none is zero.)

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
        return layout.remember((self, "parts"), lambda: self._parts(layout))

    def _parts(self, layout: Layout) -> Parts:
        pieces, plain = self._pieces(layout)
        first = (Part("plain", torch.float32, sum(n for _, _, n in plain.each)),) if self.plain else ()
        return (
            *first,
            Part("scales", torch.float32, pieces.scale_count),
            Part("codes", torch.uint8, pieces.code_bytes),
        )

    def _pieces(self, layout: Layout) -> tuple[Pieces, Moves]:
        """Where the codes and scales of what is rounded lie, and to where what is plain moves."""
        return layout.remember((self, "pieces"), lambda: self._laid_out(layout))

    def _laid_out(self, layout: Layout) -> tuple[Pieces, Moves]:
        rounded, plain, plain_at = [], [], 0
        for param, at in zip(layout.slices, layout.offsets, strict=True):
            if param.role in self.plain:
                plain.append((at, plain_at, param.numel))
                plain_at += param.numel
            else:
                rounded.append((at, param.numel, param.start))
        return Pieces.of(rounded, self.block, self.bits), Moves(tuple(plain))

    def _keys(self, layout: Layout, key: Key) -> list[int]:
        """A key for each parameter that is rounded, where anything is random."""
        if self.bits == 1 or self.rounding == "nearest":
            return []
        names = layout.remember(
            (self, "names"), lambda: [param.name for param in layout.slices if param.role not in self.plain]
        )
        return key.fold_each(names)

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        payload = Payload.empty(self.parts(layout), x.device)
        pieces, plain = self._pieces(layout)
        many.quantize(
            x,
            payload["codes"],
            payload["scales"],
            pieces,
            self._keys(layout, key),
            stochastic=self.rounding == "stochastic",
            norm=self.norm,
        )
        if plain.each:
            many.move(x, payload["plain"], plain)
        return payload

    def encode_owing(self, x: Tensor, residual: Tensor, owed: Tensor, layout: Layout, key: Key) -> Payload:
        payload = Payload.empty(self.parts(layout), x.device)
        pieces, plain = self._pieces(layout)
        many.quantize_owing(
            x,
            payload["codes"],
            payload["scales"],
            pieces,
            self._keys(layout, key),
            owing=(residual, owed),
            stochastic=self.rounding == "stochastic",
            norm=self.norm,
        )
        if plain.each:
            values = payload["plain"]
            many.move(x, values, plain)
            added = torch.empty_like(values)
            many.move(residual, added, plain)
            values.add_(added)
            # Sent as it is, nothing is owed; infinity minus itself is a NaN, as everywhere else.
            many.move(values - values, owed, plain.back)
        return payload

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        self._decode(out, payload, layout, add=add)

    def decode_onto(self, base: Tensor, payload: Payload, layout: Layout, times: float = 1.0) -> Tensor:
        if not served_by_c(base):
            return super().decode_onto(base, payload, layout, times)
        (pieces, plain), out = self._pieces(layout), memory.empty(layout.numel)
        many.dequantize_onto(base, payload["codes"], payload["scales"], out, pieces, times)
        if plain.each:
            values = payload["plain"]
            old = torch.empty_like(values)
            many.move(base, old, plain)
            many.move(torch.add(old, values, alpha=times), out, plain.back)
        return out

    def mean_into(
        self, out: Tensor, payloads: Sequence[Payload], layout: Layout, own: tuple[int, Tensor] | None = None
    ) -> None:
        if not served_by_c(out):
            super().mean_into(out, payloads, layout, own)
            return
        pieces, plain = self._pieces(layout)
        many.dequantize_mean([(one["codes"], one["scales"]) for one in payloads], out, pieces, own)
        if plain.each:
            sent = [one["plain"] for one in payloads]
            if own is not None:
                sent[own[0]] = torch.empty_like(sent[own[0]])
                many.move(own[1], sent[own[0]], plain)
            total = sent[0].clone()
            for values in sent[1:]:
                total += values
            many.move(total.mul_(1.0 / len(sent)), out, plain.back)

    def subtract_from(self, out: Tensor, payload: Payload, layout: Layout) -> None:
        self._decode(out, payload, layout, subtract=True)

    def _decode(
        self, out: Tensor, payload: Payload, layout: Layout, add: bool = False, subtract: bool = False
    ) -> None:
        pieces, plain = self._pieces(layout)
        many.dequantize(payload["codes"], payload["scales"], out, pieces, add=add, subtract=subtract)
        if not plain.each:
            return
        # The kernel leaves alone what travels plainly; to add, its old values are moved out and back again.
        values = payload["plain"]
        if add or subtract:
            old = torch.empty_like(values)
            many.move(out, old, plain)
            values = old - values if subtract else old + values
        many.move(values, out, plain.back)

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
        """One bit: ``|v|_1^2 / (B |v|_2^2) >= 1/B``. To nearest with the max norm:
        ``1 / (1 + (B-1)/(4 s^2))``, which all values but the largest just below half a level reach."""
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
