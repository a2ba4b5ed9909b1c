"""However it ends, an emulation leaves no process and no network behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from distcomp.errors import DistcompError
from distcomp.network import Fabric, emulate
from tests.network.processes import active, light_python, wait_for_death

PAUSE = "import signal; signal.pause()"
NOBODY: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
WHO = """
import os, re
print(os.getuid(), re.search("CapEff:(.*)", open("/proc/self/status").read())[1])
"""

REPORT = f"""
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {PAUSE!r}], start_new_session=True)
told = (os.getpid(), os.getppid(), child.pid, os.readlink("/proc/self/ns/net"))
os.write(1, " ".join(map(str, told)).encode() + bytes([10]))
signal.pause()
"""
EMULATOR = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
from distcomp.network import Fabric, emulate
with emulate(Fabric.uniform(2, "10mbit"), True, False, sys.argv[1] == "rootless") as net:
    def show(rank, stream, data):
        print(data.decode().strip(), flush=True)
    net.launch([sys.executable, "-c", {REPORT!r}], show=show)
"""


def networks() -> set[str]:
    """The network namespaces in which any process lives."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                found.add(os.readlink(entry / "ns/net"))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
    return found


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_an_emulator_that_is_ended(end: signal.Signals, rootless: bool) -> None:
    command = light_python(EMULATOR, "rootless" if rootless else "root")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes, text=True) as emulator, ExitStack() as stack:
        stack.callback(emulator.kill)
        assert emulator.stdout is not None
        ranks = [emulator.stdout.readline().split() for _ in range(2)]
        theirs = {line[3] for line in ranks}
        pids = {int(pid) for line in ranks for pid in line[:3]}
        assert len(pids) == 5, "two ranks, what they started, and their holder"
        assert active(pids) == list(pids)
        assert theirs <= networks()
        emulator.send_signal(end)
        wait_for_death([*pids, emulator.pid])
    assert emulator.returncode == -end
    assert not theirs & networks()


def test_nothing_outlives_a_body_that_raises(any_way: bool) -> None:
    pids: list[int] = []

    def body() -> None:
        with emulate(Fabric.uniform(2), True, False, any_way) as net:
            pids.extend(net.start([sys.executable, "-c", PAUSE]).pids.values())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body()
    assert len(pids) == 2
    assert active(pids) == []


def test_a_killed_rank_is_reported_and_the_network_stands(any_way: bool) -> None:
    with emulate(Fabric.uniform(3), True, False, any_way) as net:
        job = net.start([sys.executable, "-c", PAUSE])
        os.kill(job.pids[2], signal.SIGKILL)
        result = job.wait(grace_s=0.1)
        assert result.first_failure == 2
        assert result.stopped == {0, 1}
        assert net.launch(["true"]).ok


def test_without_its_holder_an_emulation_is_over_and_says_so(any_way: bool) -> None:
    with emulate(Fabric.uniform(2), True, False, any_way) as net:
        job = net.start([sys.executable, "-c", REPORT])

        def kill_holder(rank: int, stream: str, data: bytes) -> None:
            holder = int(data.split()[1])
            if active([holder]):
                os.kill(holder, signal.SIGKILL)

        with pytest.raises(DistcompError, match="has died; start the emulation again"):
            job.wait(show=kill_holder)
        wait_for_death(job.pids.values())
        with pytest.raises(DistcompError, match="has died; start the emulation again"):
            net.launch(["true"])


def _python_for_all() -> str:
    """This interpreter, or the system's of the same version where only root may run this one."""
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        allowed = ["test", "-x", os.path.realpath(python)]
        if subprocess.run(allowed, check=False, **NOBODY).returncode == 0:
            return python
    pytest.skip("an ordinary user may not run this Python")


def test_an_ordinary_user_needs_no_root(tmp_path: Path) -> None:
    """As root, become nobody; as anybody else, just do it."""
    import pyroute2

    program = """
import os, sys
from distcomp.network import Fabric, emulate, support
if support().refusal: sys.exit(77)
with emulate(Fabric.uniform(2, "10mbit"), True, selftest=False) as net:
    outcome = net.launch([sys.executable, "-c", sys.argv[1]])
    print(net.describe()[0], outcome.ok)
"""
    paths = [Path(sys.modules["distcomp"].__file__ or "").parents[1], Path(pyroute2.__file__).parents[1]]
    environment = {"PYTHONPATH": ":".join(map(str, paths)), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    command = light_python(program, WHO, python=_python_for_all())
    found = subprocess.run(
        command, cwd="/", env=environment, capture_output=True, text=True, check=False, **NOBODY
    )
    if found.returncode == 77:
        pytest.skip("this machine refuses namespaces to ordinary users")
    assert found.returncode == 0, found.stderr
    uid, capabilities = found.stdout.splitlines()[0].split()
    assert int(uid) == (65534 if NOBODY else os.getuid())
    assert int(capabilities, 16) == 0
    assert "user namespace, no root" in found.stdout
    assert found.stdout.endswith("True\n")


def test_where_namespaces_are_refused_the_transport_throttles_and_it_is_said(any_way: bool) -> None:
    """In a user namespace that may have no network, nor user namespaces of its own."""
    program = """
import json, sys
from pathlib import Path
from distcomp.network import Fabric, Refused, emulate, netns, support
netns.isolate(True)
for limit in ("max_user_namespaces", "max_net_namespaces"):
    Path("/proc/sys/user", limit).write_text("0")
fabric = Fabric.uniform(2, "10mbit")
with emulate(fabric) as net:
    outcome = net.launch([sys.executable, "-c", "import os; print(os.environ['DISTCOMP_THROTTLE_BPS'])"])
    print(json.dumps([net.real_packets, net.reason, net.describe(), outcome.outputs[1], support().refusal]))
try:
    with emulate(fabric, packets=True): pass
except Refused as refusal:
    print(refusal)
"""
    found = subprocess.run(light_python(program), capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    rank_0, told, refusal = found.stdout.splitlines()
    real_packets, reason, lines, rank_1, unsupported = json.loads(told)
    assert rank_0 == rank_1.strip() == "10000000.0"
    assert not real_packets
    assert "NOT REAL PACKETS" in lines[0]
    assert reason in lines[0]
    assert reason == refusal == unsupported
    assert "network namespaces are refused here" in refusal
    assert "run as root, or allow user namespaces" in refusal


def test_no_firewall_sees_what_the_bridges_forward_and_the_machines_own_settings_stay(
    rootless: bool,
) -> None:
    switches = sorted(Path("/proc/sys/net/bridge").glob("bridge-nf-call-*"))
    if not switches:
        pytest.skip("this kernel filters no bridge (br_netfilter is not loaded)")
    before = [switch.read_text() for switch in switches]
    program = f"""
from pathlib import Path
from distcomp.network import Fabric, netns, shape
netns.isolate({rootless})
print(*(Path(switch).read_text().strip() for switch in {[str(one) for one in switches]}))
shape.build(Fabric.uniform(2, "10mbit"), netem=False)
print(*(Path(switch).read_text().strip() for switch in {[str(one) for one in switches]}))
"""
    found = subprocess.run(light_python(program), capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    at_first, built = (line.split() for line in found.stdout.splitlines())
    assert "1" in at_first  # the kernel's default in a new network
    assert set(built) == {"0"}
    assert [switch.read_text() for switch in switches] == before
