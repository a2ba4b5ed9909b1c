"""Does the wire hold its rate? Each rank sends to the next, all at once; then once more after idle.

A rate counts the frames that carry the message, headers included, from before the first byte is sent until
the last has been received. (TCP's acknowledgements of the opposite stream, some 2 % of a busy link, come on
top.) The message after idle catches a bucket so deep that it gives bandwidth away.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from distcomp.errors import DistcompError
from distcomp.network import control_socket, helper_process
from distcomp.network.fabric import Fabric
from distcomp.network.launch import Job, show_nothing
from distcomp.network.shape import FRAME_BYTES, FRAME_PAYLOAD_BYTES, retransmitted_segments
from distcomp.network.units import UNSHAPED, format_rate

_LASTING_S = (0.25, 0.05)  # in bulk, and after idle
_IDLE_S = 0.3
_LEAST_BYTES, _MOST_BYTES = 16 << 10, 32 << 20
_PORT = 29400
_TIMEOUT_S = 60.0
_TOLERANCE = 0.1


@dataclass(frozen=True)
class LinkTest:
    """The rate from one rank to the next: asked, achieved in bulk, and achieved by one message after idle."""

    source: int
    target: int
    asked_bps: float
    achieved_bps: float
    after_idle_bps: float
    retransmitted_segments: int

    @property
    def holds_rate(self) -> bool:
        """Are both measurements within 10 % of what was asked? Always so for an unshaped link."""
        measured = (self.achieved_bps, self.after_idle_bps)
        return self.asked_bps == UNSHAPED or all(
            abs(bps / self.asked_bps - 1) <= _TOLERANCE for bps in measured
        )


def measure(
    fabric: Fabric, addresses: Sequence[str], run_on: Callable[[Mapping[int, Sequence[str]]], Job]
) -> tuple[LinkTest, ...]:
    """Send around the ring of all ranks, rack by rack, so that one message at a time crosses each uplink.

    ``run_on`` starts a command on each of the hosts that it names.
    """
    ring = sorted(range(fabric.ranks), key=lambda rank: (fabric.rack_of(rank), rank))
    if len(ring) < 2:
        return ()
    links = list(zip(ring, ring[1:] + ring[:1], strict=True))
    commands = _commands(fabric, addresses, links)
    result = run_on(commands).wait(_TIMEOUT_S, grace_s=1.0, show=show_nothing)
    if not result.ok:
        said = result.outputs[result.first_failure or 0].strip().splitlines()[-1:] or ["it said nothing"]
        remedy = "try again, or skip it with selftest=False"
        raise DistcompError(f"the self-test of the emulated network failed ({said[0]}); {remedy}")
    return tuple(
        LinkTest(source, target, fabric.path_rate_bps(source, target), **json.loads(result.outputs[source]))
        for source, target in links
    )


def _commands(
    fabric: Fabric, addresses: Sequence[str], links: Sequence[tuple[int, int]]
) -> dict[int, list[str]]:
    sizes = {
        target: [message_bytes(fabric.path_rate_bps(source, target), lasting_s) for lasting_s in _LASTING_S]
        for source, target in links
    }
    plans = {
        source: {
            "address": addresses[source], "target": addresses[target], "first": source == links[0][0],
            "sends": sizes[target], "receives": sizes[source],
        }
        for source, target in links
    }  # fmt: skip
    return {
        source: helper_process.command("link_self_test", json.dumps(plan)) for source, plan in plans.items()
    }


def message_bytes(rate_bps: float, lasting_s: float) -> int:
    """A message that takes about `lasting_s` at a rate."""
    return int(min(max(rate_bps / 8 * lasting_s, _LEAST_BYTES), _MOST_BYTES))


def report_lines(links: Sequence[LinkTest]) -> list[str]:
    """One line: the asked rate, and the slowest and fastest that was achieved, in bulk and after idle."""
    if not links:
        return []
    asked = " and ".join(format_rate(rate) for rate in sorted({link.asked_bps for link in links}))
    bulk = _range([link.achieved_bps for link in links])
    after_idle = _range([link.after_idle_bps for link in links])
    lines = [f"self-test: asked {asked}, achieved {bulk}, one message after idle {after_idle}"]
    off = [f"{link.source} to {link.target}" for link in links if not link.holds_rate]
    if off:
        lines.append(f"self-test: off by more than {_TOLERANCE:.0%}: {', '.join(off)} (is the machine busy?)")
    return lines


def main(plan: str) -> None:
    """What each rank runs; prints its measurements as JSON."""
    settings = json.loads(plan)
    with socket.create_server((settings["address"], _PORT)) as server:
        to_next = _connect(settings["target"])
        from_previous, _ = server.accept()
    for peer in (to_next, from_previous):
        peer.settimeout(_TIMEOUT_S)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    rates_bps = []
    for index, idle_s in enumerate((0.0, _IDLE_S)):
        time.sleep(idle_s)
        _start_together(to_next, from_previous, settings["first"])
        rates_bps.append(
            measure_link(to_next, from_previous, settings["sends"][index], settings["receives"][index])
        )
    achieved_bps, after_idle_bps = rates_bps
    result = {"achieved_bps": achieved_bps, "after_idle_bps": after_idle_bps}
    json.dump({**result, "retransmitted_segments": retransmitted_segments()}, sys.stdout)


def _connect(address: str) -> socket.socket:
    """Connect to the next rank, which may still be starting."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            return socket.create_connection((address, _PORT), timeout=_TIMEOUT_S)
        except ConnectionRefusedError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)


def _start_together(to_next: socket.socket, from_previous: socket.socket, first: bool) -> None:
    """Twice around the ring: once to hear that everybody is there, once to say so."""
    for _ in range(2):
        if first:
            to_next.sendall(b"?")
        _receive(from_previous, 1)
        if not first:
            to_next.sendall(b"?")


def measure_link(to_next: socket.socket, from_previous: socket.socket, sends: int, receives: int) -> float:
    """Send and receive at once. All ranks share a clock, so the receiver can say when it had the last."""
    with ThreadPoolExecutor(1) as pool:
        started_s = pool.submit(_send, to_next, bytes(sends))
        _receive(from_previous, receives)
        control_socket.send_message(from_previous, {"arrived_s": time.monotonic()})
        receipt = control_socket.receive(to_next)
        if receipt is None:
            raise ConnectionError("the next rank has closed its connection")
        frames_bytes = sends * FRAME_BYTES / FRAME_PAYLOAD_BYTES
        return frames_bytes * 8 / float(receipt["arrived_s"] - started_s.result())


def _send(peer: socket.socket, message: bytes) -> float:
    started_s = time.monotonic()
    peer.sendall(message)
    return started_s


def _receive(peer: socket.socket, length: int) -> None:
    buffer = bytearray(min(length, 1 << 18))
    while length:
        received = peer.recv_into(buffer, min(length, len(buffer)))
        if not received:
            raise ConnectionError("the previous rank has closed its connection")
        length -= received


def _range(rates_bps: list[float]) -> str:
    low, high = (f"{rate / 1e6:.1f}" for rate in (min(rates_bps), max(rates_bps)))
    return f"{low} Mbit/s" if low == high else f"{low} to {high} Mbit/s"
