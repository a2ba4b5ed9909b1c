"""From message times to a fabric: links, racks, uplinks; and on real ranks."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distcomp import cli
from distcomp.errors import DistcompError
from distcomp.network import Fabric, Rack
from distcomp.network.framing import framed_bytes
from distcomp.network.probe import LinkFit, fabric_from, link_of, racks_of

SIZES = [1, 1 << 14, 1 << 18, 1 << 20]


def times(latency_s: float, rate_bps: float, seed: int = 0, wrong: float = 0.0) -> np.ndarray:
    """``[sizes, 9]``: 1 % of noise, and some that took ten times as long."""
    rng = np.random.default_rng(seed)
    true = np.array([latency_s + 8 * framed_bytes(size) / rate_bps for size in SIZES])
    noisy = true[:, None] * np.exp(rng.normal(0, 0.01, (len(SIZES), 9)))
    return noisy * np.where(rng.random(noisy.shape) < wrong, 10.0, 1.0)


@pytest.mark.parametrize("wrong", [0.0, 0.2])
@pytest.mark.parametrize("rate_bps", [1e7, 1e9])
def test_latency_and_rate_come_back_despite_outliers(rate_bps: float, wrong: float) -> None:
    link = link_of(SIZES, times(3e-4, rate_bps, 1, wrong))
    assert link.latency_s == pytest.approx(3e-4, rel=0.05)
    assert link.rate_bps == pytest.approx(rate_bps, rel=0.05)
    assert link.spread == pytest.approx(0.01, rel=1.0)
    assert list(link.curve_s) == sorted(link.curve_s)


def test_one_size_makes_no_line() -> None:
    with pytest.raises(DistcompError, match="two message sizes"):
        link_of([4], [[1.0]])


def test_racks_are_where_messages_take_longer() -> None:
    place = np.array([0, 1, 0, 1, 2, 2])
    seconds = np.where(place[:, None] == place[None], 1.0, 2.0)
    seconds *= np.exp(np.random.default_rng(0).normal(0, 0.02, (6, 6)))
    assert racks_of(seconds) == ((0, 2), (1, 3), (4, 5))
    assert racks_of(np.where(np.eye(6) > 0, 0, np.linspace(1, 1.4, 36).reshape(6, 6))) == (tuple(range(6)),)
    assert racks_of(np.array([[0.0, 5.0], [5.0, 0.0]])) == ((0, 1),)


def test_the_fabric_of_two_racks() -> None:
    place = [0, 0, 1, 1]
    links = {
        (i, j): LinkFit(1e-4 if place[i] == place[j] else 5e-3, 1e8 if place[i] == place[j] else 5e7, 0.0, ())
        for i, j in itertools.combinations(range(4), 2)
    }
    fabric = fabric_from(links, ((0, 1), (2, 3)), [5e7, 4e7])
    racks = (Rack((0, 1), 5e7, 0.00245), Rack((2, 3), 4e7, 0.00245))
    assert fabric == Fabric((1e8,) * 4, 1e-4, racks)
    assert Fabric.parse(fabric.to_toml()) == fabric


def test_probe_wants_a_launcher(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert cli.main(["probe"]) == 2
    assert "torchrun" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert cli.main(["probe"]) == 2
    assert "start 2 or more" in capsys.readouterr().err


def test_three_ranks_probe_each_other(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3",
            "-m", "distcomp", "probe", "--largest", "262144", "--json", "-o", str(tmp_path / "fabric.toml"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout[done.stdout.index("{") :])
    assert [one["pair"] for one in told["pairs"]] == [[0, 1], [0, 2], [1, 2]]
    assert all(np.all(np.diff(one["curve_s"]) >= 0) for one in told["pairs"])
    fabric = Fabric.from_toml(tmp_path / "fabric.toml")
    assert fabric.ranks == 3
    assert min(fabric.rates_bps) > 1e7
