"""What bytes weigh as Ethernet frames: TCP cuts a stream in segments, and every segment carries headers."""

from __future__ import annotations

SEGMENT_BYTES = 1448
"""TCP payload of a full frame: 1500 less 20 of IPv4, 20 of TCP and 12 of timestamps."""

HEADER_BYTES = 66
"""Ethernet (14), IPv4 (20), TCP with timestamps (32): what the queue charges a frame besides its payload."""

SEGMENTS_PER_ACK = 2
"""A receiver acknowledges every other full segment, with a frame of headers alone."""


def framed_bytes(payload_bytes: float) -> float:
    """What a sender's queue is charged for a stream of this length, headers included."""
    return payload_bytes * (1 + HEADER_BYTES / SEGMENT_BYTES)


def acknowledged_bytes(payload_bytes: float) -> float:
    """What the receiver of such a stream sends back."""
    return payload_bytes * HEADER_BYTES / SEGMENT_BYTES / SEGMENTS_PER_ACK


def exchanged_bytes(payload_bytes: float) -> float:
    """What a rank's queue is charged when it sends and receives this much, as in every symmetric exchange."""
    return framed_bytes(payload_bytes) + acknowledged_bytes(payload_bytes)


WINDOW_S, LEAST_WINDOW_BYTES = 20e-3, 64 << 10


def window_bytes(rate_bps: float, delay_s: float = 0.0) -> float:
    """How much of a connection an emulated network lets be under way at once."""
    return max(rate_bps / 8 * (WINDOW_S + 2 * delay_s), LEAST_WINDOW_BYTES)
