"""One rank's link in a container: the rank, what cannot be shaped, giving root up, and the queues."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distcomp.errors import DistcompError
from distcomp.network import Fabric, container
from distcomp.network.shape import shape_own


def test_the_rank_is_one_of_the_fabric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert container.rank_of(Fabric.uniform(2)) == 1
    for wrong in ("2", "-1", "first", ""):
        monkeypatch.setenv("RANK", wrong)
        with pytest.raises(DistcompError, match="set it to a rank of the fabric, 0 to 1"):
            container.rank_of(Fabric.uniform(2))


def test_racks_are_refused() -> None:
    racks = Fabric.parse("ranks = 2\n[[rack]]\nranks = [0]\n[[rack]]\nranks = [1]\n")
    with pytest.raises(DistcompError, match="racks share an uplink"):
        shape_own(racks, 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give root up")
def test_root_is_given_up_for_good() -> None:
    program = """
import os
from distcomp.network.container import become
become("nobody")
assert os.getuid() == os.geteuid() != 0 and os.getgid() != 0 and not os.getgroups()
try:
    os.setuid(0)
except PermissionError:
    print("gone")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("gone", 0), done.stderr


SHAPED = """
import ctypes, sys
CLONE_NEWNET = 0x40000000
if ctypes.CDLL(None).unshare(CLONE_NEWNET):
    sys.exit("no namespace")
from pyroute2 import IPRoute
with IPRoute() as route:
    route.link("add", ifname="eth0", kind="veth", peer={"ifname": "far"})
    for name in ("eth0", "far"):
        route.link("set", index=route.link_lookup(ifname=name)[0], state="up")
from distcomp.network.container import main
sys.argv = ["container", "fabric.toml", sys.executable, "-c", sys.argv[1]]
main()
"""
SEEN = """
import json, os
from pyroute2 import IPRoute
with IPRoute() as route:
    names = {one["index"]: one.get_attr("IFLA_IFNAME") for one in route.get_links()}
    found = []
    for queue in route.get_qdiscs():
        rate = None
        if queue.get_attr("TCA_KIND") == "tbf":
            rate = queue.get_attr("TCA_OPTIONS").get_attr("TCA_TBF_PARMS")["rate"]
        found.append([names[queue["index"]], queue.get_attr("TCA_KIND"), rate])
    ingress = route.link_lookup(ifname="eth0")[0]
    filters = [one.get_attr("TCA_KIND") for one in route.get_filters(index=ingress, parent=0xFFFF0000)]
print(json.dumps([found, filters, os.environ["DISTCOMP_DEVICE"]]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a network of its own")
def test_a_link_is_held_to_its_rate_both_ways_or_the_missing_part_is_named(tmp_path: Path) -> None:
    (tmp_path / "fabric.toml").write_text('ranks = 2\nrate = "unshaped"\n[rates]\n1 = "10mbit"\n')
    done = subprocess.run(
        [sys.executable, "-c", SHAPED, SEEN],
        cwd=tmp_path, env={**os.environ, "RANK": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "this kernel gives no" in done.stderr:
        assert "modprobe" in done.stderr
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    queues, filters, device = json.loads(done.stdout)
    assert ["eth0", "tbf", 1_250_000] in queues
    assert ["arriving", "tbf", 1_250_000] in queues
    assert ["eth0", "ingress", None] in queues
    assert "u32" in filters
    assert device == "eth0"
