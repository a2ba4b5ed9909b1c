"""What a mixture of experts sends, and when it is better to send tokens than experts' gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distcomp.calls.codec import CodecLike, codec_for
from distcomp.methods.registry import compressor_of
from distcomp.network import Fabric
from distcomp.network.model import all_gather_load, all_to_all_load, ring_all_reduce
from distcomp.payload import HEADER, Part, wire_bytes

COMPARED_BYTES = wire_bytes((Part("digest", torch.int64, 1),))
"""What ranks compare before each call, to every other rank."""


@dataclass(frozen=True)
class MixtureShape:
    """T tokens of a rank and step, E experts of width D x H, k of them for each token, over W ranks."""

    tokens: int
    width: int
    hidden: int
    experts: int
    k: int
    ranks: int

    @property
    def expert_values(self) -> int:
        """Numbers that all experts hold: two matrices and two biases each."""
        return self.experts * (2 * self.width * self.hidden + self.hidden + self.width)

    @property
    def row_values(self) -> float:
        """Numbers that a rank sends as rows in a step, ``4 T k D (W-1) / W``: there and back, forward and
        backward, where tokens are spread evenly over the ranks."""
        return 4 * self.tokens * self.k * self.width * (self.ranks - 1) / self.ranks

    @property
    def gradient_values(self) -> float:
        """Numbers that a rank sends to all-reduce the experts' gradients, ``2 P (W-1) / W``: ``4 E D H (W-1)
        / W`` and the biases."""
        return 2 * self.expert_values * (self.ranks - 1) / self.ranks

    def break_even_tokens(self, row_bits: float = 32.0, gradient_bits: float = 32.0) -> float:
        """Tokens of a rank and step below which rows are fewer bytes than gradients: ``E H / k`` at equal
        bits (and the biases), times ``gradient_bits / row_bits``."""
        return self.expert_values / (2 * self.k * self.width) * gradient_bits / row_bits


def bits_per_value(codec: CodecLike, width: int) -> float:
    """Bits of a number in rows of ``width``, by a codec, without headers."""
    rows = 1024
    parts = codec_for(codec, torch.float32).parts((rows, width))
    return 8 * (wire_bytes(parts) - HEADER.size) / (rows * width)


def call_bytes(payloads: Sequence[int], numbers: int = 0) -> int:
    """What a rank sends in a call: what ranks compare, ``numbers`` of 8 bytes that they tell each other, and
    the payloads."""
    others = len(payloads)
    told = wire_bytes((Part("digest", torch.int64, numbers),)) if numbers else 0
    return others * (COMPARED_BYTES + told) + sum(payloads)


def row_call_bytes(rows: Sequence[int], width: int, codec: CodecLike) -> int:
    """What a rank sends to route ``rows[j]`` rows of float32 to each other rank: a payload each, and all
    sizes."""
    known = codec_for(codec, torch.float32)
    payloads = [wire_bytes(known.parts((count, width))) for count in rows]
    return call_bytes(payloads, 2 * (len(rows) + 1))


def count_call_bytes(experts_here: int, ranks: int) -> int:
    """What a rank sends to tell every other how many rows its experts will get."""
    payload = wire_bytes((Part("values", torch.int64, experts_here),))
    return call_bytes([payload] * (ranks - 1), 2 * ranks)


SMALL_EXCHANGES = 15
"""Of a step, one behind the other, beside those of rows: before each of its seven calls (counts, four of
rows, balance forward and backward) ranks compare what they ask, before five of them their sizes; and counts
and balance themselves are small."""


def step_bytes(shape: MixtureShape, codec: CodecLike) -> float:
    """Bytes of rows that a rank sends in a step, where tokens are spread evenly; without what is compared."""
    return shape.row_values * bits_per_value(codec, shape.width) / 8


def expert_parallel_s(shape: MixtureShape, codec: CodecLike, fabric: Fabric) -> float:
    """Seconds that the rows of a step take on a network, there and back, forward and backward, and the small
    exchanges around them."""
    ranks = tuple(range(shape.ranks))
    each = step_bytes(shape, codec) / 4 / max(1, shape.ranks - 1)
    rows = all_to_all_load([each] * shape.ranks, ranks, fabric)
    small = all_gather_load([COMPARED_BYTES] * shape.ranks, ranks, fabric)
    return 4 * rows.cost(fabric).seconds + SMALL_EXCHANGES * small.cost(fabric).seconds


def data_parallel_s(shape: MixtureShape, method: CodecLike, fabric: Fabric) -> float:
    """Seconds that the experts' gradients of a step take on a network, all-reduced by a codec."""
    nbytes = shape.expert_values * bits_per_value(method, shape.width) / 8
    return ring_all_reduce(nbytes, tuple(range(shape.ranks)), fabric).cost(fabric).seconds


def traffic_summary(shape: MixtureShape, codec: CodecLike, gradient_codec: CodecLike = "identity") -> str:
    """When expert parallelism beats all-reducing the experts, in three lines."""
    plain = shape.break_even_tokens()
    row_bits, gradient_bits = (bits_per_value(one, shape.width) for one in (codec, gradient_codec))
    packed = shape.break_even_tokens(row_bits, gradient_bits)
    better = "rows" if shape.tokens < packed else "gradients"
    return "\n".join(
        [
            f"rows: {shape.row_values:,.0f} values a step and rank by {compressor_of(codec)} "
            f"({row_bits:.2f} bits each); experts' gradients: {shape.gradient_values:,.0f} "
            f"({gradient_bits:.2f} bits each)",
            f"expert parallelism sends less while T < E H / k = {plain:,.0f} tokens of a rank and step; with "
            f"these codecs while T < {packed:,.0f}",
            f"here T = {shape.tokens:,}: send {better}",
        ]
    )
