r"""Run ranks on one machine across another network: real packets, held to a rate by the kernel.

    with emulate(Fabric.uniform(4, "100mbit")) as net:
        print("\\n".join(net.describe()))
        outcome = net.launch([sys.executable, "train.py"])

Each rank lives in a network namespace of its own; both ends of its cable are shaped with `tc tbf`, so is the
uplink of each rack. Where the kernel has `netem` it delays the packets. What the machine refuses is left to
distcomp's transport, which obeys ``DISTCOMP_THROTTLE_BPS`` and ``DISTCOMP_DELAY_S``, and `describe` says so.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from distcomp.errors import DistcompError
from distcomp.network import control_socket, helper_process, link_self_test
from distcomp.network.fabric import Fabric
from distcomp.network.launch import MEMORY_ENV, Command, Job, LaunchResult, Show, show_rank_0
from distcomp.network.netns import Refused
from distcomp.network.qdisc import QueueCount
from distcomp.network.shape import DEVICE, burst_bytes
from distcomp.network.units import UNSHAPED, format_rate, format_time

_OURS = ("DISTCOMP_DEVICE", "DISTCOMP_THROTTLE_BPS", "DISTCOMP_DELAY_S")
_FIRST_PORT = 29500
_GOODBYE_S = 20.0
_INFINITY = float("inf")
_ELSEWHERE = (
    "emulation is made of Linux's network namespaces and queues, which this system has none of; run it on "
    "Linux or in a Linux container, and train here without it"
)


@dataclass(frozen=True)
class CableCounters:
    """What has crossed one rank's cable, as the queues at its two ends count it, and what TCP sent twice."""

    sent: QueueCount
    received: QueueCount
    retransmitted_segments: int


class Net:
    """An emulated network that stands; made by :func:`emulate`."""

    def __init__(
        self, fabric: Fabric, control: socket.socket, built: Mapping[str, Any], reason: str | None
    ) -> None:
        self.fabric = fabric
        self.reason = reason
        """Why there are no real packets; None where there are."""
        self.rootless: bool = built.get("rootless", False)
        self.netem: bool = built.get("netem", False)
        self.addresses: list[str] = built.get("addresses", ["127.0.0.1"] * fabric.ranks)
        self.links: tuple[link_self_test.LinkTest, ...] = ()
        """What the self-test measured; empty where it did not run."""
        self._control = control
        self._launches = 0

    @property
    def real_packets(self) -> bool:
        """Do packets cross shaped links of the kernel? Otherwise the transport holds itself to the rate."""
        return self.reason is None

    @property
    def delayed_by(self) -> str:
        """Who delays messages: ``"nobody"``, ``"netem"`` (the kernel) or ``"transport"``."""
        if not _delays(self.fabric):
            return "nobody"
        return "netem" if self.netem else "transport"

    def launch(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        per_rank_env: Sequence[Mapping[str, str]] | None = None,
        timeout_s: float = _INFINITY,
        grace_s: float = 20.0,
        show: Show = show_rank_0,
    ) -> LaunchResult:
        """Run `argv` once on every rank and wait for all; see :meth:`start` and :meth:`Job.wait`."""
        return self.start(argv, env, per_rank_env).wait(timeout_s, grace_s, show)

    def start(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        per_rank_env: Sequence[Mapping[str, str]] | None = None,
    ) -> Job:
        """Start `argv` once on every rank, with the variables that ``init_process_group("gloo")`` reads.

        Each rank's environment is this process's, then RANK, WORLD_SIZE, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1 and
        what :meth:`run_on` adds, then `env`, then ``per_rank_env[rank]``.
        """
        own = per_rank_env or [{}] * self.fabric.ranks
        if len(own) != self.fabric.ranks:
            counts = f"{len(own)} entries for {self.fabric.ranks} ranks"
            raise DistcompError(f"per_rank_env has {counts}; give one for each rank")
        shared = {"WORLD_SIZE": str(self.fabric.ranks), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        port = self._port()
        commands = {}
        for rank, mine in enumerate(own):
            variables = {**shared, "RANK": str(rank), **(env or {}), **mine}
            commands[rank] = Command(argv, {**self._environment(rank, port), **variables})
        return Job(self._control, commands)

    def run_in(self, host: int, argv: Sequence[str], env: Mapping[str, str] | None = None) -> Job:
        """Start one program on one host; see :meth:`run_on`."""
        return self.run_on({host: argv}, env)

    def run_on(self, commands: Mapping[int, Sequence[str]], env: Mapping[str, str] | None = None) -> Job:
        """Start one program on each of some hosts, such as a torchrun agent each, to be waited for together.

        The environment is this process's, with OMP_NUM_THREADS=1, PYTHONUNBUFFERED=1 and a malloc that keeps
        its memory unless it says otherwise, then MASTER_ADDR (host 0), MASTER_PORT, GLOO_SOCKET_IFNAME,
        DISTCOMP_DEVICE (whose queue to read with `read_qdisc_bytes`; with real packets only),
        DISTCOMP_THROTTLE_BPS and DISTCOMP_DELAY_S (what the transport must do itself; only where it must),
        then `env`.
        """
        port = self._port()
        environment = {host: {**self._environment(host, port), **(env or {})} for host in commands}
        return Job(self._control, {host: Command(argv, environment[host]) for host, argv in commands.items()})

    def counters(self) -> list[CableCounters]:
        """What has crossed each rank's cable so far: the figures of `tc -s qdisc`."""
        self._demand_packets("there is no queue that counts")
        counts = self._ask({"ask": "count"})["counts"]
        return [
            CableCounters(
                QueueCount(**count["sent"]), QueueCount(**count["received"]), count["retransmitted"]
            )
            for count in counts
        ]

    def link(self, rank: int, up: bool) -> None:
        """Pull a rank's cable out of its switch, or push it in again; nobody is told, as in life."""
        self._demand_packets("there is no cable to pull")
        self._check_host(rank)
        self._ask({"ask": "link", "host": rank, "up": up})

    def folder(self) -> str:
        """A new temporary folder, which is removed with the network, also where this process is killed."""
        return str(self._ask({"ask": "folder"})["folder"])

    def facts(self) -> dict[str, Any]:
        """What :meth:`describe` says, as values for a result file; rates asked for as text."""
        return {
            "fabric": self.fabric.to_toml(),
            "real_packets": self.real_packets,
            "reason": self.reason,
            "rootless": self.rootless,
            "delayed_by": self.delayed_by,
            "selftest": [{**asdict(link), "asked_bps": format_rate(link.asked_bps)} for link in self.links],
        }

    def describe(self) -> list[str]:
        """Lines that say what network this is, how it is made, and what the self-test measured."""
        return [_describe_making(self), *_describe_delay(self), *link_self_test.report_lines(self.links)]

    def _environment(self, host: int, port: int) -> dict[str, str]:
        self._check_host(host)
        inherited = {name: value for name, value in os.environ.items() if name not in _OURS}
        return {
            **MEMORY_ENV,
            "OMP_NUM_THREADS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # it warns that emulated hosts have no names
            "PYTHONUNBUFFERED": "1",
            **inherited,
            "MASTER_ADDR": self.addresses[0],
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": DEVICE if self.real_packets else "lo",
            **self._left_to_transport(host),
        }

    def _left_to_transport(self, host: int) -> dict[str, str]:
        variables = {}
        if self.real_packets:
            variables["DISTCOMP_DEVICE"] = DEVICE
        elif self.fabric.rates_bps[host] != UNSHAPED:
            variables["DISTCOMP_THROTTLE_BPS"] = repr(self.fabric.rates_bps[host])
        if self.delayed_by == "transport":
            others = (self.fabric.path_delay_s(host, other) for other in range(self.fabric.ranks))
            variables["DISTCOMP_DELAY_S"] = repr(max(others))
        return variables

    def _port(self) -> int:
        """A port nobody has used: in a private network any is free."""
        if self.real_packets:
            self._launches += 1
            return _FIRST_PORT + self._launches % 10_000
        with socket.create_server(("127.0.0.1", 0)) as server:
            return int(server.getsockname()[1])

    def _check_host(self, host: int) -> None:
        if not 0 <= host < self.fabric.ranks:
            raise DistcompError(f"there is no host {host}; hosts are 0 to {self.fabric.ranks - 1}")

    def _demand_packets(self, lack: str) -> None:
        if self.reason is not None:
            raise DistcompError(f"without real packets {lack}; {self.reason}")

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        with control_socket.post(self._control, message) as envelope:
            return control_socket.answer(envelope)


@dataclass(frozen=True)
class EmulationSupport:
    """What this machine allows: real packets or not (`refusal` says why, with the remedy), and how."""

    refusal: str | None
    rootless: bool
    netem: bool


def support(force_rootless: bool = False) -> EmulationSupport:
    """Try it: build a network of two ranks, tell what worked, and leave nothing behind."""
    if sys.platform != "linux":
        return EmulationSupport(_ELSEWHERE, rootless=False, netem=False)
    fabric = Fabric.uniform(2, "1mbit")
    with _holder() as control:
        message = {"ask": "build", "fabric": fabric.to_toml(), "delays": True, "rootless": force_rootless}
        with control_socket.post(control, message) as envelope:
            try:
                built = control_socket.answer(envelope)
            except Refused as refusal:
                return EmulationSupport(str(refusal), rootless=False, netem=False)
            return EmulationSupport(None, built["rootless"], built["netem"])


@contextmanager
def emulate(
    fabric: Fabric, packets: bool | None = None, selftest: bool = True, force_rootless: bool = False
) -> Iterator[Net]:
    """Stand up `fabric` on this machine; leave nothing behind, however the body or this process ends.

    `packets`: True demands real ones, False leaves rate and delay to distcomp's transport, None (the default)
    takes real ones where the kernel allows them. `selftest` measures the rates first. `force_rootless` takes
    the way through a user namespace even as root. Raises DistcompError for what cannot be built; Refused
    (with the remedy) where `packets` is True and the machine refuses, or where the transport cannot stand in
    (racks).
    """
    with _holder() as control:
        net = _build(fabric, control, packets, force_rootless)
        if net.real_packets and selftest:
            net.links = link_self_test.measure(fabric, net.addresses, net.run_on)
        yield net


def _build(fabric: Fabric, control: socket.socket, packets: bool | None, force_rootless: bool) -> Net:
    if packets is False:
        return Net(fabric, control, {}, _without_packets(fabric, "real packets were not asked for"))
    text, delays = fabric.to_toml(), _delays(fabric)
    message = {"ask": "build", "fabric": text, "delays": delays, "rootless": force_rootless}
    with control_socket.post(control, message) as envelope:
        try:
            return Net(fabric, control, control_socket.answer(envelope), None)
        except Refused as refusal:
            if packets:
                raise
            return Net(fabric, control, {}, _without_packets(fabric, str(refusal)))


def _without_packets(fabric: Fabric, reason: str) -> str:
    if any(rack.uplink_bps != UNSHAPED for rack in fabric.racks):
        raise Refused(f"a rack's uplink cannot be throttled rank by rank, it takes real packets; {reason}")
    return reason


@contextmanager
def _holder() -> Iterator[socket.socket]:
    """A holder process at the other end of a socket; when the body ends it kills everything and goes."""
    if sys.platform != "linux":
        raise Refused(_ELSEWHERE)
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            helper_process.command("supervisor", str(theirs.fileno())),
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    try:
        yield ours
    finally:
        ours.close()
        try:
            process.wait(_GOODBYE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _delays(fabric: Fabric) -> bool:
    return bool(fabric.delay_s or any(rack.delay_s for rack in fabric.racks))


def _describe_making(net: Net) -> str:
    rates = sorted(set(net.fabric.rates_bps))
    rate = " to ".join(format_rate(rate) for rate in dict.fromkeys((rates[0], rates[-1])))
    racks = f" in {len(net.fabric.racks)} racks" if net.fabric.racks else ""
    network = f"{net.fabric.ranks} ranks{racks} at {rate}"
    if net.reason is not None:
        return f"{network}: these are NOT REAL PACKETS, the transport throttles itself ({net.reason})"
    how = "user namespace, no root" if net.rootless else "root"
    burst = "" if rates[0] == UNSHAPED else f", tc tbf both ways, burst {burst_bytes(rates[0])} bytes"
    return f"{network}: real packets, network namespaces ({how}){burst}, TCP reno"


def _describe_delay(net: Net) -> list[str]:
    longest = max(net.fabric.path_delay_s(0, other) for other in range(net.fabric.ranks))
    return {
        "nobody": [],
        "netem": [f"delay {format_time(longest)} one way, by netem in the kernel"],
        "transport": [
            f"delay {format_time(longest)} one way, added by the transport: there is no netem here"
        ],
    }[net.delayed_by]
