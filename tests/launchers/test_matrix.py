"""One script under every launcher: the same weights, bit for bit, for two ranks add in one order only."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]
LAUNCHERS = ROOT / "launchers"
BESIDE = Path(sys.executable).parent
SCRIPT = [str(ROOT / "examples" / "digits.py"), "--steps", "6", "--width", "48"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
KNOWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

SRUN = """\
#!/usr/bin/env bash
# Stands in for srun: two tasks on this host, told apart as Slurm tells them.
while [[ $1 == -* ]]; do shift; done
pids=()
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2 \\
        SLURM_STEP_NODELIST=localhost SLURM_STEP_ID=0 "$@" &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || exit 1; done
"""


def clean(**environment: str) -> dict[str, str]:
    """This process's environment without what a launcher says."""
    kept = {name: value for name, value in os.environ.items() if name not in KNOWN}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **environment}


def train(command: list[str], saved: Path, **environment: str) -> dict[str, torch.Tensor]:
    """Run the example under a launcher; the weights that rank 0 saved."""
    done = subprocess.run(
        [*command, "--save", str(saved)],
        env=clean(**environment),
        cwd=saved.parent,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    weights: dict[str, torch.Tensor] = torch.load(saved, weights_only=True)
    return weights


@pytest.fixture(scope="module")
def by_torchrun(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, torch.Tensor]]:
    """What all others must come to, by method."""

    @cache
    def weights(method: str) -> dict[str, torch.Tensor]:
        saved = tmp_path_factory.mktemp("torchrun") / "w.pt"
        return train([*TORCHRUN, "--standalone", *SCRIPT, "--method", method], saved)

    return weights


@pytest.fixture
def wanted(by_torchrun: Callable[[str], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """With the method that the script uses if none is named."""
    weights = by_torchrun("qsgd:bits=4")
    assert all(value.isfinite().all() for value in weights.values())
    return weights


def check(weights: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(weights[name], wanted[name])] == []


nightly = pytest.mark.skipif("DISTCOMP_NIGHTLY" not in os.environ, reason="run by scripts/nightly")


@pytest.mark.parametrize(
    ("backend", "method"),
    [
        ("mpi4py", "qsgd:bits=4"),
        pytest.param("mpi4py", "ddp", marks=nightly),
        pytest.param("gloo", "qsgd:bits=4", marks=nightly),
    ],
)
def test_mpirun(
    backend: str, method: str, by_torchrun: Callable[[str], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """Over Gloo; distcomp's requests over MPI itself; DDP's over torch.distributed's backend."""
    pytest.importorskip("mpi4py", reason="mpi4py is not installed; pip install 'distcomp[mpi]'")
    mpirun = [str(BESIDE / "mpirun"), "-n", "2", sys.executable]
    command = [*mpirun, *SCRIPT, "--backend", backend, "--method", method]
    check(train(command, tmp_path / "w.pt"), by_torchrun(method))


def test_emulation(wanted: dict[str, torch.Tensor], tmp_path: Path) -> None:
    network = ["--ranks", "2", "--rate", "1gbit", "--method", "qsgd:bits=4", "--output", str(tmp_path / "o")]
    emulate = [sys.executable, "-m", "distcomp", "emulate", "--cold", *network, *SCRIPT]
    check(train(emulate, tmp_path / "w.pt"), wanted)


def test_slurm(wanted: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """The batch script itself, with a stand-in for srun."""
    srun = tmp_path / "srun"
    srun.write_text(SRUN)
    srun.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    batch = [str(LAUNCHERS / "slurm" / "train.sbatch"), *SCRIPT]
    check(train(batch, tmp_path / "w.pt", PATH=path, SLURM_JOB_ID=str(os.getpid())), wanted)


@nightly
def test_torchrun_elastic(wanted: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Between one and two nodes, of which one comes."""
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    torchrun.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    given = {"PATH": path, "NODES": "1:2", "PER_NODE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    weights = train([str(LAUNCHERS / "torchrun" / "elastic.sh"), *SCRIPT], tmp_path / "w.pt", **given)
    check(weights, wanted)


@pytest.mark.skipif(
    shutil.which("horovodrun") is None, reason="horovodrun is missing; scripts/test-horovod builds it"
)
def test_horovodrun(wanted: dict[str, torch.Tensor], tmp_path: Path) -> None:
    check(train(["horovodrun", "-np", "2", sys.executable, *SCRIPT], tmp_path / "w.pt"), wanted)


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed; pip install 'distcomp[ray]'"
)
def test_ray(wanted: dict[str, torch.Tensor], tmp_path: Path) -> None:
    ray = [sys.executable, str(LAUNCHERS / "ray" / "train.py"), "--workers", "2"]
    check(train([*ray, *SCRIPT], tmp_path / "w.pt"), wanted)


@pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="submitit is not installed; pip install submitit"
)
@pytest.mark.parametrize("cluster", ["local", "slurm"])
def test_submitit(cluster: str, wanted: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Its own executors: here, and as a batch script with stand-ins for sbatch, srun and sacct."""
    shown, log = tmp_path / "shown.sh", tmp_path / "batch.log"
    job = "SLURM_JOB_ID=7 SLURM_NTASKS=2 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_JOB_NODELIST=localhost"
    stand_ins = {
        "srun": SRUN.replace("do shift;", "do [[ $1 == --output || $1 == --error ]] && shift; shift;"),
        "sbatch": f"#!/bin/sh\ncp $1 {shown}\n{job} sh $1 >{log} 2>&1 &\necho Submitted batch job 7\n",
        "sacct": "#!/bin/sh\necho 'JobID|State|NodeList|'\necho '7|RUNNING|localhost|'\n",
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    options = [
        "--cluster",
        cluster,
        "--tasks-per-node",
        "2",
        "--minutes",
        "5",
        "--logs",
        str(tmp_path / "logs"),
    ]
    options += ["--slurm", "partition=long"] if cluster == "slurm" else []
    command = [sys.executable, str(LAUNCHERS / "submitit" / "submit.py"), *options]
    check(train([*command, *SCRIPT], tmp_path / "w.pt", PATH=path), wanted)
    if cluster == "slurm":
        flags = set(re.findall(r"^#SBATCH --(.*)$", shown.read_text(), re.MULTILINE))
        assert {"nodes=1", "ntasks-per-node=2", "time=5", "partition=long"} <= flags


def free_port() -> int:
    """Below those that the system hands out, and those that Slurm's ranks choose."""
    choices = random.Random(os.getpid())
    while True:
        port = choices.randrange(4_000, 10_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def test_skypilot(wanted: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """The task's own commands on one node, with the variables that SkyPilot sets."""
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    torchrun.chmod(0o755)
    task = yaml.safe_load((LAUNCHERS / "skypilot" / "train.yaml").read_text())
    given = task["envs"] | {"SCRIPT": SCRIPT[0], "RANKS": "2"}
    given |= {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "127.0.0.1\n"}
    given["PATH"] = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    # the file's script takes no arguments
    run = task["run"].replace('"$SCRIPT"', '"$SCRIPT" "$@"').replace("29500", str(free_port()))
    check(train(["bash", "-c", run, "task", *SCRIPT[1:]], tmp_path / "w.pt", **given), wanted)


@nightly
def test_alone(tmp_path: Path) -> None:
    assert train([sys.executable, *SCRIPT], tmp_path / "w.pt")
