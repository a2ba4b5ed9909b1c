"""What a mixture of experts sends, and when it is better to send tokens than experts' gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distcomp.calls.codec import CodecLike, codec_for
from distcomp.calls.row_counts import count_parts
from distcomp.methods.registry import compressor_of
from distcomp.network.request_sizes import RequestSizes
from distcomp.payload import HEADER, Part, wire_bytes


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


def row_call_bytes(rows: Sequence[int], width: int, codec: CodecLike) -> int:
    """What a rank sends to route ``rows[j]`` rows of float32 to each other rank: a payload each."""
    known = codec_for(codec, torch.float32)
    return sum(wire_bytes(known.parts((count, width))) for count in rows)


def count_call_bytes(experts_here: int, ranks: int) -> int:
    """What a rank sends to tell every other how many rows its experts will get."""
    return (ranks - 1) * wire_bytes(count_parts(experts_here))


def balance_call_bytes(experts: int, ranks: int) -> int:
    """What a rank sends to add importance and load over the ranks; as much again in the backward."""
    return (ranks - 1) * wire_bytes((Part("values", torch.float32, 2 * experts),))


SMALL_CALLS = 3
"""Of a step, beside the four that route rows: counts, and balance forward and backward."""


def step_calls(shape: MixtureShape, codec: CodecLike) -> tuple[RequestSizes, ...]:
    """What the ranks ask of each other in a step, in order, where tokens are spread evenly and need
    gradients: computing waits for each.

    Forward counts, balance, rows there and back; backward rows there and back, balance.
    """
    ranks, others = shape.ranks, max(1, shape.ranks - 1)
    rows = RequestSizes(
        "all_to_all",
        (row_call_bytes([math.ceil(shape.tokens * shape.k / ranks)], shape.width, codec),) * ranks,
    )
    counts = RequestSizes("all_to_all", (count_call_bytes(shape.experts // ranks, ranks) / others,) * ranks)
    balance = RequestSizes("all_to_all", (balance_call_bytes(shape.experts, ranks) / others,) * ranks)
    return (counts, balance, rows, rows, rows, rows, balance)


def step_bytes(shape: MixtureShape, codec: CodecLike) -> float:
    """Bytes of rows that a rank sends in a step, where tokens are spread evenly; without what is compared."""
    return shape.row_values * bits_per_value(codec, shape.width) / 8


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
