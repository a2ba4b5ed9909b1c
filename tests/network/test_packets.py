"""Real packets: they stay in their own network, never beat their rate, and are counted to the byte."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from distcomp.network import UNSHAPED, Fabric, Net, Rack, emulate, link_self_test, parse_rate, shape
from distcomp.network.launch import show_nothing
from distcomp.network.shape import FRAME_BYTES, FRAME_PAYLOAD_BYTES, burst_bytes

SEND_BYTES = 1_000_000
TRANSFER = f"""
import os, socket, sys
sys.path.append({str(Path(shape.__file__).parent)!r})
from qdisc import read_qdisc_bytes
device = os.environ["DISTCOMP_DEVICE"]
if os.environ["RANK"] == "1":
    with socket.create_server(("10.0.0.2", 5000)) as server:
        print("listening", flush=True)
        peer, _ = server.accept()
        while peer.recv(1 << 16): pass
else:
    import time
    while True:
        try: peer = socket.create_connection(("10.0.0.2", 5000)); break
        except ConnectionRefusedError: time.sleep(0.01)
    before = read_qdisc_bytes(device)
    peer.sendall(bytes({SEND_BYTES}))
    peer.shutdown(socket.SHUT_WR)
    peer.recv(1)
    print(read_qdisc_bytes(device) - before, read_qdisc_bytes(device))
"""
KNOCK = """
import socket
knock = socket.socket()
knock.settimeout(0.5)
try: knock.connect(("10.0.0.2", 9))
except ConnectionRefusedError: print("somebody refused")
except OSError: print("nobody there")
"""
OFFLOADS = """
import array, fcntl, socket, struct
from pyroute2 import IPRoute
for question in (0x1E, 0x23, 0x2B):  # ETHTOOL_GTSO, ETHTOOL_GGSO, ETHTOOL_GGRO
    value = array.array("I", [question, 7])
    fcntl.ioctl(socket.socket(), 0x8946, struct.pack("16sQ8x", b"eth0", value.buffer_info()[0]))
    print(value[1], end=" ")
with IPRoute() as route:
    print(route.get_links(ifname="eth0")[0].get_attr("IFLA_GSO_MAX_SIZE"))
"""
SURROUNDINGS = """
import json, os, re, socket, sys
caps = re.search("CapEff:\\t(.*)", open("/proc/self/status").read())[1]
devices = sorted(name for _, name in socket.if_nameindex())
told = {"devices": devices, "network": os.readlink("/proc/self/ns/net"), "caps": int(caps, 16)}
told["ipv6"] = "eth0" in open("/proc/net/if_inet6").read()
told["tcp"] = open("/proc/sys/net/ipv4/tcp_congestion_control").read().strip()
told["window"] = int(open("/proc/sys/net/ipv4/tcp_rmem").read().split()[2])
json.dump({**told, "uid": os.getuid(), "env": dict(os.environ)}, sys.stdout)
"""


def ask(net: Net, program: str) -> list[str]:
    result = net.launch([sys.executable, "-c", program], timeout_s=60, show=show_nothing)
    assert result.ok, result.outputs
    return [result.outputs[rank] for rank in range(net.fabric.ranks)]


def test_each_rank_has_a_network_of_its_own_in_which_it_is_itself(rootless: bool) -> None:
    fabric = Fabric.uniform(2, "10mbit")
    with emulate(fabric, True, selftest=False, force_rootless=rootless) as one:
        with emulate(fabric, True, selftest=False, force_rootless=rootless) as two:
            told = [json.loads(text) for net in (one, two) for text in ask(net, SURROUNDINGS)]
        again = [json.loads(text) for text in ask(one, SURROUNDINGS)]
    assert one.rootless == rootless
    assert "user namespace" in one.describe()[0] if rootless else "(root)" in one.describe()[0]
    networks = {os.readlink("/proc/self/ns/net"), *(rank["network"] for rank in told)}
    assert len(networks) == 5, "two emulations at once share no network, nor do their ranks"
    assert [rank["network"] for rank in again] == [rank["network"] for rank in told[:2]]
    for rank in told:
        assert rank["devices"] == ["eth0", "lo"]
        assert rank["uid"] == os.getuid()
        assert (rank["ipv6"], rank["tcp"]) == (False, "reno")
        assert rank["window"] <= 1 << 18, "what stands in a queue of 10 Mbit/s is late by 0.2 s and no more"
        assert (rank["env"]["DISTCOMP_DEVICE"], rank["env"]["GLOO_SOCKET_IFNAME"]) == ("eth0", "eth0")
        assert rank["env"]["MASTER_ADDR"] == one.addresses[0] == "10.0.0.1"
        assert "DISTCOMP_THROTTLE_BPS" not in rank["env"]


def test_no_message_beats_its_rate_in_bulk_or_after_idle(rootless: bool) -> None:
    """One rank is unshaped: what it sends only the switch's queue can hold, what it gets only its peer's."""
    with emulate(Fabric((10e6, UNSHAPED)), True, force_rootless=rootless) as net:
        assert [link.asked_bps for link in net.links] == [10e6, 10e6]
        for link in net.links:
            assert link.achieved_bps <= 1.05 * link.asked_bps
            assert link.after_idle_bps <= 1.1 * link.asked_bps
        assert "asked 10mbit, achieved" in net.describe()[1]
        facts = json.loads(json.dumps(net.facts(), allow_nan=False))
        assert (facts["real_packets"], facts["rootless"], facts["delayed_by"]) == (True, rootless, "nobody")
        assert Fabric.parse(facts["fabric"]) == net.fabric
        assert facts["selftest"][1]["achieved_bps"] == net.links[1].achieved_bps


def test_racks_share_an_uplink_that_no_message_beats(any_way: bool) -> None:
    racks = (Rack((0, 1), 10e6), Rack((2,)))
    with emulate(Fabric((UNSHAPED,) * 3, racks=racks), True, force_rootless=any_way) as net:
        inside, out, back = net.links
        assert (inside.asked_bps, out.asked_bps, back.asked_bps) == (UNSHAPED, 10e6, 10e6)
        assert inside.achieved_bps > 10e6
        for link in (out, back):
            assert link.achieved_bps <= 1.05 * link.asked_bps
            assert link.after_idle_bps <= 1.1 * link.asked_bps


@pytest.mark.parametrize("rate", ["100mbit", "unshaped"])
def test_the_queue_counts_frames_with_their_headers(rate: str, any_way: bool) -> None:
    least_bytes = SEND_BYTES * FRAME_BYTES / FRAME_PAYLOAD_BYTES
    with emulate(Fabric.uniform(2, rate), True, selftest=False, force_rootless=any_way) as net:
        sent_bytes, read_bytes = map(int, ask(net, TRANSFER)[0].split())
        sender, receiver = net.counters()
        if shutil.which("tc"):
            shown = (
                net.run_in(0, ["tc", "-s", "qdisc", "show", "dev", "eth0"]).wait(show=show_nothing).outputs[0]
            )
            assert f"Sent {sender.sent.sent_bytes} bytes" in shown
    assert least_bytes <= sent_bytes <= 1.005 * least_bytes
    assert read_bytes <= sender.sent.sent_bytes <= read_bytes + 2 * FRAME_BYTES
    assert sender.sent.sent_bytes == receiver.received.sent_bytes, (
        "one end of the wire gets what the other sent"
    )
    assert receiver.sent.sent_bytes == sender.received.sent_bytes < 0.05 * sent_bytes
    assert sender.sent.dropped_packets == receiver.received.dropped_packets == 0


@pytest.mark.parametrize(("rate", "bundled"), [("10mbit", False), ("100mbit", True), ("1gbit", True)])
def test_what_crosses_in_one_piece_is_small_against_the_rate(rate: str, bundled: bool, any_way: bool) -> None:
    with emulate(Fabric.uniform(1, rate), True, selftest=False, force_rootless=any_way) as net:
        tso, gso, gro, largest_bytes = map(int, ask(net, OFFLOADS)[0].split())
    assert (tso, gso, gro) == (bundled, bundled, False)
    assert not bundled or 2 * FRAME_BYTES <= largest_bytes <= burst_bytes(parse_rate(rate)) / 2


def test_a_cable_can_be_pulled_and_pushed_in_again(rootless: bool) -> None:
    with emulate(Fabric.uniform(2, "10mbit"), True, selftest=False, force_rootless=rootless) as net:
        answers = []
        for up in (True, False, True):
            net.link(1, up)
            answers.append(
                net.run_in(0, [sys.executable, "-c", KNOCK]).wait(show=show_nothing).outputs[0].strip()
            )
    assert answers == ["somebody refused", "nobody there", "somebody refused"]


def test_a_delay_is_made_by_the_kernel_or_left_to_the_transport(any_way: bool) -> None:
    with emulate(Fabric.uniform(2, "10mbit", "5ms"), True, selftest=False, force_rootless=any_way) as net:
        told = [json.loads(text)["env"].get("DISTCOMP_DELAY_S") for text in ask(net, SURROUNDINGS)]
        assert (net.delayed_by, told) in (("netem", [None, None]), ("transport", ["0.005", "0.005"]))
        assert ("netem in the kernel" if net.netem else "added by the transport") in net.describe()[1]


def test_a_rate_counts_frames_until_the_last_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 100.25])
    monkeypatch.setattr(link_self_test, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        rate_bps = link_self_test.measure_link(ours, theirs, sends=SEND_BYTES, receives=SEND_BYTES)
    assert rate_bps == pytest.approx(4 * 8 * SEND_BYTES * FRAME_BYTES / FRAME_PAYLOAD_BYTES)


def test_shapes_are_as_deep_as_documented() -> None:
    assert burst_bytes(100e6) == 12_500
    assert burst_bytes(10e6) == burst_bytes(1.0) == 2 * FRAME_BYTES
    assert all(burst_bytes(a) <= burst_bytes(b) for a, b in pairwise([1e3, 1e6, 1e9, UNSHAPED]))
