"""Build a fabric out of kernel parts, in the network namespace this process is in.

Each rank gets a namespace with one interface, `eth0`, whose other end is plugged into its rack's bridge;
racks are plugged into a core bridge. Every cable has a `tc tbf` on both ends, so both directions hold their
rate::

    eth0 ==tbf== rank0 [rack0] up0 ==tbf== down0 [core] down1 ==tbf== up1 [rack1] rank1 ==tbf== eth0
"""

from __future__ import annotations

import array
import errno
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distcomp.errors import DistcompError, require
from distcomp.network import netns
from distcomp.network.fabric import Fabric
from distcomp.network.framing import window_bytes
from distcomp.network.units import UNSHAPED, format_rate

DEVICE = "eth0"
"""What a rank's interface is called inside its namespace."""

FRAME_BYTES = 1514
"""The largest frame: 1500 bytes of IP and 14 of Ethernet, as the queue counts it."""

FRAME_PAYLOAD_BYTES = 1448
"""How much of it is a TCP stream's own: 20 bytes of IP, 20 of TCP and 12 of timestamps are not."""

_BURST_S = 1e-3
_QUEUE_BYTES = 256 << 20  # never full, for the ranks' windows are bounded: the switch loses nothing
_LARGEST_BUNDLE_BYTES = 64 << 10
_BUNDLE_SHARE = 1 / 2  # of the bucket: what crosses as one piece
_MOST_RANKS = 1000  # a Linux bridge has 1024 ports
_FASTEST_BPS = 8 * 0xFFFFFFFF  # tbf's rate is a 32-bit number of bytes
_ROOT, _CHILD, _INNER = 0x10000, 0x10001, 0x100000  # tc's 1:, 1:1 and 10:
_INGRESS, _ALL, _ARRIVING = 0xFFFF0000, 0x0300, "arriving"  # tc's ffff:, ETH_P_ALL in network order
_SUBNET = ipaddress.ip_network("10.0.0.0/16")
_SIOCETHTOOL, _STSO, _SGSO, _SGRO = 0x8946, 0x1F, 0x24, 0x2C  # from linux/ethtool.h


@dataclass(frozen=True)
class EmulatedHost:
    """One rank's machine: its namespace, its address, and the bridge's end of its cable."""

    namespace: int
    address: str
    plug: str


def burst_bytes(rate_bps: float) -> int:
    """How deep the token bucket is: 1 ms of the rate, and never below two frames.

    A deep bucket gives bandwidth away after idle (64 kB at 10 Mbit/s is 50 ms for nothing). One of a single
    frame loses every microsecond by which the kernel's timer is late.
    """
    return int(max(min(rate_bps, _FASTEST_BPS) / 8 * _BURST_S, 2 * FRAME_BYTES))


def build(fabric: Fabric, netem: bool) -> list[EmulatedHost]:
    """Build the whole network and return its hosts; `netem` puts the delays into the kernel's queues.

    Raises DistcompError for a fabric that cannot be built, Refused where the kernel lacks or forbids a part.
    """
    if fabric.ranks > _MOST_RANKS:
        raise DistcompError(f"{fabric.ranks} ranks do not fit on one bridge; give {_MOST_RANKS} or fewer")
    _quiet("all")
    _unfiltered()
    with _netlink() as route:
        racks = [_bridge(route, f"rack{index}") for index in range(max(1, len(fabric.racks)))]
        core = _bridge(route, "core") if len(racks) > 1 else None
        for index, rack in enumerate(fabric.racks):
            if core is not None:
                _cable(route, f"up{index}", {"ifname": f"down{index}"})
                for name, bridge in ((f"up{index}", racks[index]), (f"down{index}", core)):
                    _plug(route, name, bridge)
                    _shape(route, name, rack.uplink_bps, rack.delay_s if netem else 0.0)
        homes = [racks[fabric.rack_of(rank)] for rank in range(fabric.ranks)]
        return [_host(route, fabric, rank, home, netem) for rank, home in enumerate(homes)]


def shape_own(fabric: Fabric, rank: int, device: str = DEVICE) -> None:
    """Give `device`, the one interface of this container, the link of `rank`: its rate each way, and the
    delay.

    What leaves is held by the device's own queue; what arrives is redirected to another device, whose queue
    holds it. Raises DistcompError for racks, whose uplinks no container owns, Refused as :func:`build`.
    """
    if fabric.racks:
        raise DistcompError(
            "racks share an uplink, and a container has its own link only; take the racks out, or use "
            "distcomp emulate --fabric"
        )
    with _netlink() as route:
        _shape(route, device, fabric.rates_bps[rank], fabric.delay_s)
        if fabric.rates_bps[rank] == UNSHAPED:
            return
        with _needs("redirection of what arrives", "load it (modprobe ifb act_mirred cls_u32)"):
            route.link("add", ifname=_ARRIVING, kind="ifb")
            ifb, index = socket.if_nametoindex(_ARRIVING), socket.if_nametoindex(device)
            route.link("set", index=ifb, state="up")
            route.tc("add", "ingress", index, _INGRESS)
            redirect = {"kind": "mirred", "direction": "egress", "action": "redirect", "ifindex": ifb}
            everything = {"keys": ["0x0/0x0+0"], "target": _ROOT, "protocol": _ALL}
            route.tc("add-filter", "u32", index, parent=_INGRESS, action=[redirect], **everything)
        _shape(route, _ARRIVING, fabric.rates_bps[rank], 0.0)


def has_netem() -> bool:
    """Can this kernel delay packets? Tried on the loopback of this private network."""
    with _netlink() as route:
        index = socket.if_nametoindex("lo")
        try:
            with _needs("netem", ""):
                route.tc("add", "netem", index, _ROOT, delay=1000, limit=1)
        except netns.Refused:
            return False
        route.tc("del", index=index, handle=_ROOT, parent=0xFFFFFFFF)
        return True


def set_link(plug: str, up: bool) -> None:
    """Push a host's cable into its bridge, or pull it out."""
    with _netlink() as route:
        route.link("set", index=socket.if_nametoindex(plug), state="up" if up else "down")


def retransmitted_segments() -> int:
    """How many TCP segments have been sent twice in this network namespace."""
    lines = Path("/proc/net/snmp").read_text().splitlines()
    names, values = (line.split() for line in lines if line.startswith("Tcp:"))
    return int(values[names.index("RetransSegs")])


def _host(route: Any, fabric: Fabric, rank: int, bridge: int, netem: bool) -> EmulatedHost:
    host = EmulatedHost(netns.create_namespace(), str(_SUBNET[rank + 1]), f"rank{rank}")
    rate_bps = fabric.rates_bps[rank]
    _cable(route, host.plug, {"ifname": DEVICE, "net_ns_fd": host.namespace})
    _plug(route, host.plug, bridge)
    _shape(route, host.plug, rate_bps, 0.0)
    with netns.inside(host.namespace), _netlink() as inner:
        _quiet(DEVICE)
        _steady_tcp(*_way_to(fabric, rank, netem))
        index = socket.if_nametoindex(DEVICE)
        inner.addr("add", index=index, address=host.address, prefixlen=_SUBNET.prefixlen)
        for device in (socket.if_nametoindex("lo"), index):
            inner.link("set", index=device, state="up")
        _shape(inner, DEVICE, rate_bps, fabric.delay_s if netem else 0.0)
    return host


def _bridge(route: Any, name: str) -> int:
    """A switch that forwards at once and says nothing of its own."""
    with _needs("a bridge", "load it (modprobe bridge)"):
        route.link("add", ifname=name, kind="bridge", br_forward_delay=0, br_stp_state=0, br_mcast_snooping=0)
    index = socket.if_nametoindex(name)
    route.link("set", index=index, state="up")
    return index


def _cable(route: Any, name: str, far_end: dict[str, object]) -> None:
    with _needs("a veth pair", "load it (modprobe veth)"):
        route.link("add", ifname=name, kind="veth", peer=far_end)


def _plug(route: Any, name: str, bridge: int) -> None:
    route.link("set", index=socket.if_nametoindex(name), master=bridge, state="up")


def _shape(route: Any, name: str, rate_bps: float, delay_s: float) -> None:
    """Hold what leaves `name` to a rate, after a delay; where neither is asked, a FIFO that only counts."""
    if _FASTEST_BPS < rate_bps < UNSHAPED:
        raise DistcompError(f"{format_rate(rate_bps)} is above what tc tbf can hold; give 34gbit or unshaped")
    _segment(route, name, rate_bps)
    index, attributes = socket.if_nametoindex(name), {"handle": _ROOT}
    if rate_bps != UNSHAPED:
        with _needs("tc tbf", "load it (modprobe sch_tbf)"):
            bucket = {"rate": int(rate_bps / 8), "burst": burst_bytes(rate_bps), "limit": _QUEUE_BYTES}
            route.tc("add", "tbf", index, _ROOT, **bucket)
        attributes = {"handle": _INNER, "parent": _CHILD}
    if delay_s:
        route.tc(
            "replace", "netem", index, delay=delay_s * 1e6, limit=_QUEUE_BYTES // FRAME_BYTES, **attributes
        )
    elif rate_bps == UNSHAPED:
        route.tc("add", "bfifo", index, limit=_QUEUE_BYTES, **attributes)


def _segment(route: Any, name: str, rate_bps: float) -> None:
    """Keep what crosses as one piece small against the bucket: single frames below some 48 Mbit/s.

    Above that, 1/2 ms of the rate may travel as one bundle, as network cards take and deliver it. The queue
    still charges every frame and header of it. Without bundles the ranks' cores work for the emulation (each
    frame of each rank passes two queues with a timer of its own), and two cores cannot carry 4 x 1 Gbit/s,
    and lose packets where no queue counts them.
    """
    bundle_bytes = int(min(burst_bytes(rate_bps) * _BUNDLE_SHARE, _LARGEST_BUNDLE_BYTES))
    bundles = bundle_bytes >= 2 * FRAME_BYTES
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for command, on in ((_STSO, bundles), (_SGSO, bundles), (_SGRO, False)):
            value = array.array("I", [command, on])
            request = struct.pack("16sQ8x", name.encode(), value.buffer_info()[0])
            fcntl.ioctl(control, _SIOCETHTOOL, request)
    if bundles:
        route.link("set", index=socket.if_nametoindex(name), gso_max_size=bundle_bytes)


def _way_to(fabric: Fabric, rank: int, netem: bool) -> tuple[float, float]:
    """The rate at which everybody can reach a host, and the longest delay that packets meet on the way."""
    uplink_bps = fabric.racks[fabric.rack_of(rank)].uplink_bps if len(fabric.racks) > 1 else UNSHAPED
    delays_s = [fabric.path_delay_s(other, rank) for other in range(fabric.ranks)] if netem else [0.0]
    return min(fabric.rates_bps[rank], uplink_bps), max(delays_s)


def _steady_tcp(rate_bps: float, delay_s: float) -> None:
    """The same TCP on every machine, with a window no larger than keeps the way to this host full.

    The queues never drop, so a window of many megabytes would stand in them: at 10 Mbit/s each megabyte makes
    everybody's next message, heartbeats too, 0.8 s late.
    """
    settings = Path("/proc/sys/net/ipv4")
    with _needs("a TCP setting", "mount /proc/sys writable (in a container: --privileged)"):
        (settings / "tcp_congestion_control").write_text("reno")  # the only one allowed by every kernel
        if rate_bps != UNSHAPED:
            for name in ("tcp_rmem", "tcp_wmem"):
                smallest, initial, _ = map(int, (settings / name).read_text().split())
                largest = int(2 * window_bytes(rate_bps, delay_s))  # the kernel's bookkeeping takes half
                (settings / name).write_text(f"{smallest} {min(initial, largest)} {largest}")


def _quiet(name: str) -> None:
    """No IPv6, whose chatter would be counted as the ranks' bytes."""
    switch = Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6")
    if switch.exists():
        with _needs("an IPv6 setting", "mount /proc/sys writable (in a container: --privileged)"):
            switch.write_text("1")


def _unfiltered() -> None:
    """What bridges forward is shown to no firewall: a switch has none, and the ranks' cores would work for
    it."""
    for switch in Path("/proc/sys/net/bridge").glob("bridge-nf-call-*"):  # where br_netfilter is loaded
        with _needs("a bridge setting", "mount /proc/sys writable (in a container: --privileged)"):
            switch.write_text("0")


def _netlink() -> Any:
    return require("pyroute2", extra="emulate").IPRoute()


@contextmanager
def _needs(part: str, remedy: str) -> Iterator[None]:
    """Name the part of the kernel that the body asks for, should it be missing or forbidden."""
    netlink_error = require("pyroute2.netlink.exceptions", extra="emulate").NetlinkError
    try:
        yield
    except (OSError, netlink_error) as error:
        code = (error.errno if isinstance(error, OSError) else error.code) or errno.EIO
        remedy = netns.REMEDY if code in (errno.EPERM, errno.EACCES) else remedy
        raise netns.Refused(f"this kernel gives no {part} ({os.strerror(code)}); {remedy}") from error
