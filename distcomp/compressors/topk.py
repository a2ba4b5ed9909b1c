"""A few elements instead of all: the largest, or random ones; and their values through another compressor."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distcomp.compressors.base import (
    Compressor,
    parse_compressor,
    register_compressor,
    register_preset,
)
from distcomp.compressors.grid import WHOLE, spread
from distcomp.compressors.identity import Identity
from distcomp.compressors.quantize import Quantize
from distcomp.compressors.sparse import (
    check_ratio,
    kept_count,
    kept_layout,
    rows_of,
    sample_indices,
)
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.payload import Part, Parts, Payload
from distcomp.randomness import Key


class Sparsifier(Compressor):
    """Sends some elements of a flat buffer: their values and which they are.

    The payload: ``values``, float32, in the order of :meth:`kept`; ``indices``, uint8.
    """

    @abstractmethod
    def kept(self, layout: Layout) -> Layout:
        """The layout of the values that are sent, in the order in which they are sent."""

    @abstractmethod
    def index_part(self, layout: Layout) -> Part:
        """The part of the payload that holds the indices (uint8)."""

    @abstractmethod
    def positions(self, payload: Payload, layout: Layout) -> Tensor:
        """Where in the flat buffer the values of a payload belong; all different."""

    def values(self, payload: Payload, layout: Layout) -> Tensor:
        """The values of a payload (float32), in the order of :meth:`kept`."""
        return payload["values"]

    def parts(self, layout: Layout) -> Parts:
        return (Part("values", torch.float32, self.kept(layout).numel), self.index_part(layout))

    def put(self, out: Tensor, values: Tensor, payload: Payload, layout: Layout, scale: int) -> None:
        """Add ``scale`` times what the ``values`` (float32) of a payload stand for, at its positions."""
        out.index_add_(0, self.positions(payload, layout), values, alpha=scale)

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        self.put(out if add else out.zero_(), payload["values"], payload, layout, 1)

    def subtract_from(self, out: Tensor, payload: Payload, layout: Layout) -> None:
        self.put(out, payload["values"], payload, layout, -1)


@register_compressor("topk")
@dataclass(frozen=True)
class TopK(Sparsifier):
    """The ``k = max(1, round(ratio d))`` largest magnitudes of each parameter, exactly::

        C(x)_j = x_j  if |x_j| is among the k largest of its parameter, else 0
        |C(x) - x|^2 <= (1 - k/d) |x|^2

    Ties go to the lower index. ``chunk > 0`` takes as many of every chunk of that many elements instead of
    every parameter: faster (short rows), and a flat buffer may be cut between chunks. Long parameters are
    searched on the CPU through a sampled threshold, with the same answer. Biased: meant for error feedback.

    On the wire: 4 bytes per value that is kept and about ``2 + log2(1/ratio)`` bits per index (9 at 1 %, see
    :class:`distcomp.compressors.sparse.IndexCode`).

    Source: Aji & Heafield 2017; Stich et al., "Sparsified SGD with memory", NeurIPS 2018. We differ: indices
    are packed (the usual is 32 bits each). (GRACE cuts ``ratio d`` down to a whole number; here it is
    rounded.)

    Raises DistcompError for a ratio outside (0, 1] or a negative chunk.
    """

    ratio: float = 0.01
    chunk: int = 0

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        if self.chunk < 0:
            raise DistcompError(
                f"a chunk has at least one element, not {self.chunk}; 0 takes whole parameters"
            )

    @property
    def alignment(self) -> int:  # type: ignore[override]
        return self.chunk or WHOLE

    def kept(self, layout: Layout) -> Layout:
        return layout.remember(
            (self, "kept"),
            lambda: kept_layout(layout, [self._count(param.numel) for param in layout.slices]),
        )

    def _count(self, numel: int) -> int:
        whole, rest = divmod(numel, self.chunk or max(1, numel))
        return whole * kept_count(self.chunk or numel, self.ratio) + kept_count(rest, self.ratio)

    def index_part(self, layout: Layout) -> Part:
        return Part("indices", torch.uint8, rows_of(layout, self.ratio, self.chunk).code_bytes)

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        payload = Payload.empty(self.parts(layout), x.device)
        where, codes = self.select(x, layout)
        torch.index_select(x, 0, where, out=payload["values"])
        payload["indices"].copy_(codes)
        return payload

    def select(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Which elements of a flat buffer to send (places in it, rising), and the bytes that say so."""
        rows = rows_of(layout, self.ratio, self.chunk)
        where = rows.largest(x)
        return where, rows.encode(where)

    def positions(self, payload: Payload, layout: Layout) -> Tensor:
        return rows_of(layout, self.ratio, self.chunk).decode(payload["indices"])

    def delta(self, numel: int) -> float:
        """``k/d``, of the chunk that fares worst."""
        length = self.chunk or max(1, numel)
        lengths = {min(length, max(1, numel)), numel % length} - {0}
        return min(kept_count(chunk_numel, self.ratio) / chunk_numel for chunk_numel in lengths)


@register_compressor("random_k")
@dataclass(frozen=True)
class RandomK(Sparsifier):
    """``k = max(1, round(ratio d))`` random elements of each parameter, without replacement; sends the seed.

    ::

        C(x)_j = (d/k) x_j  if j was drawn, else 0;      E[C(x)] = x,      E|C(x) - x|^2 = (d/k - 1) |x|^2

    With ``scaled=False`` the factor ``d/k`` is left out: biased, contracts by ``delta = k/d``, for error
    feedback. On the wire: 4 bytes per value, and 8. Where all ranks draw the same elements, use the method
    :func:`distcomp.methods.random_k`, whose values ride an all-reduce.

    Source: Stich et al., "Sparsified SGD with memory", NeurIPS 2018; Konečný & Richtárik 2018.

    Raises DistcompError for a ratio outside (0, 1].
    """

    ratio: float = 0.01
    scaled: bool = True

    alignment = WHOLE

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return self.scaled

    def kept(self, layout: Layout) -> Layout:
        return kept_layout(layout, [kept_count(param.numel, self.ratio) for param in layout.slices])

    def index_part(self, layout: Layout) -> Part:
        return Part("indices", torch.uint8, 8)

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        payload = Payload.empty(self.parts(layout), x.device)
        # The key instead of the indices: whoever has it draws the same ones.
        seed = bytearray(key.bits.to_bytes(8, "little"))
        payload["indices"].copy_(torch.frombuffer(seed, dtype=torch.uint8))
        where = self.drawn(layout, key).to(x.device)
        torch.mul(x.index_select(0, where), self.factors(layout, x.device), out=payload["values"])
        return payload

    def positions(self, payload: Payload, layout: Layout) -> Tensor:
        seed = bytes(payload["indices"].tolist())
        return self.drawn(layout, Key(int.from_bytes(seed, "little"))).to(payload.wire.device)

    def drawn(self, layout: Layout, key: Key) -> Tensor:
        """The elements that a key draws, as places in the flat buffer (on the CPU)."""
        where = [torch.empty(0, dtype=torch.int64)]
        for param, at in zip(layout.slices, layout.offsets, strict=True):
            count = kept_count(param.numel, self.ratio)
            # By parameter: buckets that hold others draw the same of this one.
            where.append(sample_indices(param.numel, count, key.fold("random-k", param.name)) + at)
        return torch.cat(where)

    def factors(self, layout: Layout, device: torch.device) -> Tensor:
        """What each value that is sent is multiplied by."""
        kept = self.kept(layout)
        factors = [
            all_.numel / max(1, some.numel) if self.scaled else 1.0
            for all_, some in zip(layout.slices, kept.slices, strict=True)
        ]
        return spread(torch.tensor(factors, device=device, dtype=torch.float32), kept)

    def omega(self, numel: int) -> float | None:
        return numel / kept_count(numel, self.ratio) - 1 if self.scaled and numel else None

    def delta(self, numel: int) -> float | None:
        if self.scaled or not numel:
            return super().delta(numel)
        return kept_count(numel, self.ratio) / numel


@register_compressor("chain")
@dataclass(frozen=True)
class Chain(Compressor):
    """``sparsifier`` chooses the elements, ``quantizer`` encodes their values: ``C(x) = S^T Q(S x)``.

    For a sparsifier that contracts by ``delta_S`` (it keeps ``S x`` with ``|S x|^2 >= delta_S |x|^2``) and a
    quantizer that contracts by ``delta_Q``, the chain contracts by ``delta_S delta_Q``; for two unbiased ones
    ``1 + omega = (1 + omega_S)(1 + omega_Q)``. On the wire: the quantizer's bytes of the values, and the
    indices.

    Source: Basu et al., "Qsparse-local-SGD", NeurIPS 2019; Horváth et al. 2019 (composition).
    """

    sparsifier: Sparsifier = field(default_factory=TopK)
    quantizer: Compressor = field(default_factory=lambda: Quantize(8, rounding="nearest"))

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return self.sparsifier.unbiased and self.quantizer.unbiased

    @property
    def alignment(self) -> int:  # type: ignore[override]
        """Blocks of values must not be cut either, and those lie on a grid of their own."""
        return self.sparsifier.alignment if self.quantizer.alignment == 1 else WHOLE

    def parts(self, layout: Layout) -> Parts:
        return (*self.quantizer.parts(self.sparsifier.kept(layout)), self.sparsifier.index_part(layout))

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        kept = self.sparsifier.kept(layout)
        selected = self.sparsifier.encode(x, layout, key)
        # Another key than the sparsifier's: the noise of rounding must not go with what was chosen.
        values = self.quantizer.encode(selected["values"], kept, key.fold("values"))
        payload = Payload.empty(self.parts(layout), x.device)
        payload.body[: values.body.numel()] = values.body
        payload["indices"].copy_(selected["indices"])
        return payload

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        self.sparsifier.put(out if add else out.zero_(), self.values(payload, layout), payload, layout, 1)

    def subtract_from(self, out: Tensor, payload: Payload, layout: Layout) -> None:
        self.sparsifier.put(out, self.values(payload, layout), payload, layout, -1)

    def positions(self, payload: Payload, layout: Layout) -> Tensor:
        """Where the values of a payload belong."""
        return self.sparsifier.positions(payload, layout)

    def values(self, payload: Payload, layout: Layout) -> Tensor:
        """The values that were sent, decoded."""
        kept = self.sparsifier.kept(layout)
        encoded = Payload(payload.wire, self.quantizer.parts(kept))  # they come first, the indices last
        return self.quantizer.decode(encoded, kept)

    def omega(self, numel: int) -> float | None:
        chosen = self.sparsifier.omega(numel)
        if chosen is None or not numel:
            return None
        rounded = self.quantizer.omega(kept_numel(self.sparsifier, numel))
        return None if rounded is None else (1 + chosen) * (1 + rounded) - 1

    def delta(self, numel: int) -> float | None:
        if self.sparsifier.unbiased:
            return super().delta(numel)
        chosen = self.sparsifier.delta(numel)
        rounded = self.quantizer.delta(kept_numel(self.sparsifier, numel))
        return None if chosen is None or rounded is None else chosen * rounded


def kept_numel(sparsifier: Sparsifier, numel: int) -> int:
    """How many elements a sparsifier keeps of a parameter of ``numel``."""
    return sparsifier.kept(Layout.of([("x", (numel,))])).numel


register_preset("fp32", Identity())
for _bits in (8, 4, 2):
    register_preset(f"int{_bits}", Quantize(_bits, rounding="nearest"))
    register_preset(f"{_bits}bit", Quantize(_bits, rounding="nearest"))  # as the papers write it
register_preset("int1", Quantize(1))


def with_values(sparsifier: Sparsifier, values: str | Compressor) -> Compressor:
    """The sparsifier with its values in another form, given as a compressor or the text of one: ``int4``.

    The named integers are rounded to nearest: the chain is biased as it is.

    Raises DistcompError for a name that is not known.
    """
    compressor = parse_compressor(values)
    return sparsifier if isinstance(compressor, Identity) else Chain(sparsifier, compressor)
