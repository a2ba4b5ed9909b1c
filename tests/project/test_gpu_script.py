"""The script for GPUs, on a CPU: its shell names what failed, its judgements can fail, its lines run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import _gpu_place, gpu
from benchmarks._gpu_kernels import bandwidth_part, same_bits
from benchmarks._gpu_parts import TOLERANCE, farthest, judged, told, under_load
from benchmarks._gpu_place import Place, RankFailed, on_ranks
from benchmarks._gpu_training import READS, counted_waits
from benchmarks.compressors import SUBJECTS
from distcomp.compressors import Identity
from distcomp.layout import Layout
from distcomp.payload import Payload
from distcomp.randomness import Key
from tests.project.pages import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.sh"
STAND_IN = """\
#!/usr/bin/env bash
shift 2  # -m benchmarks.gpu
echo "ran $*"
case $1 in
    {failing}) exit 3 ;;
    {endless}) exec sleep 600 ;;
esac
"""


def script(*words: str, limit_s: float = 280, **environment: str) -> subprocess.CompletedProcess[str]:
    told = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(
        [SCRIPT, *words], env=told, capture_output=True, text=True, check=False, timeout=limit_s
    )


def stand_in(folder: Path, failing: str = "nobody", endless: str = "nobody") -> dict[str, str]:
    """A Python for the script that only says what it was asked."""
    path = folder / "python"
    path.write_text(STAND_IN.format(failing=failing, endless=endless))
    path.chmod(0o755)
    return {"PYTHON": str(path)}


def test_a_part_that_fails_is_named_and_the_others_run(tmp_path: Path) -> None:
    done = script(**stand_in(tmp_path, failing="ddp"))
    assert done.returncode == 1
    assert done.stderr == "gpu.sh: failed: ddp (status 3)\n"
    asked = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ran ")]
    assert asked == [gpu.ABOUT, *gpu.PARTS]


def test_a_part_that_does_not_end_is_named_and_the_others_run(tmp_path: Path) -> None:
    done = script("ddp", "graphs", LIMIT_S="1", **stand_in(tmp_path, endless="ddp"))
    assert (done.returncode, done.stderr) == (1, "gpu.sh: failed: ddp (not over after 1 s)\n")
    assert "ran graphs" in done.stdout


def test_who_interrupts_the_script_leaves_nothing_running(tmp_path: Path) -> None:
    told = {**os.environ, **stand_in(tmp_path, endless="ddp")}
    with subprocess.Popen([SCRIPT, "ddp"], env=told, stdout=subprocess.PIPE, text=True) as begun:
        assert begun.stdout is not None
        assert any(line == "ran ddp\n" for line in begun.stdout)
        begun.terminate()
        begun.communicate(timeout=120)  # ends when nobody holds the pipe any more
    assert begun.returncode == 130


def test_all_went_well_is_status_0(tmp_path: Path) -> None:
    done = script("ddp", "--rehearse", **stand_in(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    *_, asked, _, _ = done.stdout.splitlines()
    said, folder = asked.rsplit(" ", 1)
    assert said == "ran ddp --rehearse --to"
    assert not Path(folder).exists()


def test_what_cannot_begin_is_status_2(tmp_path: Path) -> None:
    unknown = script("dpp", **stand_in(tmp_path))
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "dpp is no part; there are kernels bandwidth ddp" in unknown.stderr
    nowhere = script(**stand_in(tmp_path, failing=gpu.ABOUT))
    assert nowhere.returncode == 2
    assert nowhere.stdout.count("ran ") == 1


def test_the_parts_of_the_script_are_those_of_the_module_and_take_less_than_ten_minutes() -> None:
    text = SCRIPT.read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("declare -A limits="))
    limits = dict(word.strip("()[").split("]=") for word in line.partition("=")[2].split())
    assert list(limits) == list(gpu.PARTS)
    assert sum(map(int, limits.values())) < 600
    assert f"every=({' '.join(gpu.PARTS)})" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "ddp"])
    with pytest.raises(SystemExit, match=r"sees no GPU here: .* --rehearse"):
        gpu.main()


def test_a_part_is_kept_beside_the_others(tmp_path: Path) -> None:
    place = Place(rehearsal=True, seed=7)
    gpu.keep("ddp", {"ok": True}, place, tmp_path)
    gpu.keep("graphs", {"ok": False, "failed": "it did not end"}, place, tmp_path)
    kept = json.loads(gpu.keep("graphs", {"ok": True, "rows": {}}, place, tmp_path).read_text())
    assert kept["seed"] == 7
    assert set(kept["parts"]) == {"ddp", "graphs"}
    assert all(part["ok"] for part in kept["parts"].values())
    assert "failed" not in kept["parts"]["graphs"]
    assert all("nothing here was measured" in part["rehearsal"] for part in kept["parts"].values())


def test_what_a_part_raises_is_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(place: Place) -> dict[str, Any]:
        raise ValueError("out of order")

    monkeypatch.setitem(gpu.PARTS, "ddp", broken)
    assert gpu.outcome("ddp", Place(True)) == {"ok": False, "failed": "ValueError: out of order"}


def row(**changes: Any) -> dict[str, Any]:
    return {"losses": [2.0, 1.0], "digest": "a", "payload_bytes": 8, "step_s": 0.1, **changes}


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ([row(losses=[2.0, 1 + 2 * TOLERANCE]), row()], [row(), row()]),
        ([row(losses=[2.0, float("nan")]), row()], [row(), row()]),
        ([row(), row(digest="b")], [row(), row()]),
        ([row(), row(payload_bytes=9)], [row(), row()]),
        ([row(losses=[1.0, 2.0])] * 2, [row(losses=[1.0, 2.0])] * 2),
    ],
    ids=["losses", "nan", "replicas", "bytes", "learned nothing"],
)
def test_what_differs_from_the_cpu_is_not_ok(here: list[dict[str, Any]], there: list[dict[str, Any]]) -> None:
    assert judged([row(), row()], [row(digest="of a CPU"), row()])["ok"]
    assert not judged(here, there)["ok"]


def test_a_load_must_be_there_and_change_no_bit() -> None:
    def ranks(**changes: Any) -> list[dict[str, Any]]:
        loaded = {"products beside": 3, **row(**changes)}
        return [{"qsgd, alone": row(), "qsgd, under load": loaded}]

    assert under_load(ranks(), "qsgd")["ok"]
    assert not under_load(ranks(losses=[2.0, 1.0000001]), "qsgd")["ok"]
    assert not under_load(ranks(digest="b"), "qsgd")["ok"]
    nothing = [{**one, "qsgd, under load": {"products beside": 0, **row()}} for one in ranks()]
    assert not under_load(nothing, "qsgd")["ok"]


def test_two_ranks_on_one_device_are_told_in_words() -> None:
    assert told([row(), row()]) == "trained, replicas equal"
    assert told([row(), row(digest="b")]) == "replicas differ"
    assert told([row(), {"refused": "RuntimeError: no"}]) == "RuntimeError: no"


def test_a_number_that_python_reads_counts_as_a_wait() -> None:
    x, device = torch.ones(3), torch.device("cpu")
    assert counted_waits(lambda: x.sum(), device) == {}
    assert counted_waits(lambda: (x.sum().item(), bool(x[0] > 0)), device) == {READS: 2}


def test_bits_and_distances() -> None:
    x = torch.tensor([0.0, float("nan"), 1e-45])
    assert same_bits(x, x.clone())
    assert not same_bits(x, torch.tensor([-0.0, float("nan"), 1e-45]))
    assert not same_bits(x, torch.tensor([0.0, 0.0, 1e-45]))
    assert farthest([2.0, 3.0], [2.0, 4.0]) == 0.25
    assert farthest([float("nan")], [1.0]) == float("inf")


def test_every_codec_is_timed_both_ways() -> None:
    found = bandwidth_part(Place(rehearsal=True))
    assert found["ok"]
    assert set(found["rows"]) == set(SUBJECTS)
    for way in ("encode", "decode"):
        assert all(one[way]["copies"] > 0 and one[way]["tb_s"] > 0 for one in found["rows"].values())


def test_a_codec_that_fails_is_named_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Identity):
        def encode(self, x: torch.Tensor, layout: Layout, key: Key) -> Payload:
            raise ValueError("no such element")

    monkeypatch.setitem(SUBJECTS, "bf16", Broken())
    found = bandwidth_part(Place(rehearsal=True))
    assert not found["ok"]
    assert [name for name, one in found["rows"].items() if "failed" in one] == ["bf16"]
    assert found["rows"]["bf16"] == {"failed": "ValueError: no such element"}


@pytest.mark.timeout(600)
def test_ranks_are_rehearsed_and_write_no_result() -> None:
    result = ROOT / "benchmarks" / "results" / "gpu.json"
    before = result.read_bytes() if result.exists() else None
    done = script("graphs", "--rehearse", limit_s=560)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gpu.sh: all went well: graphs" in done.stdout
    assert '"bits equal": true' in done.stdout
    assert "a CPU has no CUDA graphs" in done.stdout
    assert (result.read_bytes() if result.exists() else None) == before


def test_a_rank_that_fails_is_named_in_its_own_words() -> None:
    with pytest.raises(RankFailed, match=r"ddp: rank [01] ended with 1: .*KeyError: 'methods'"):
        on_ranks("ddp", 2, "cpu", "gloo", {"limit_s": 250.0})


def test_ranks_that_do_not_end_are_named_and_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu_place, "rank_command", lambda name: ["sleep", "600"])
    with pytest.raises(RankFailed, match=r"ddp: rank 0 had not ended after 0\.1 s: it said nothing"):
        on_ranks("ddp", 2, "cpu", "gloo", {"limit_s": 0.1})
