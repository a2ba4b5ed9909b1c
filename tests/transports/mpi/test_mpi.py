"""Over MPI: the conformance tests, torch.distributed's collectives, DDP, and a rank that stops."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.calls import test_calls

pytest.importorskip("mpi4py", reason="mpi4py is not installed; pip install 'distcomp[mpi]'")

ROOT = Path(__file__).parents[3]
JOBS = ("-m", "tests.transports.mpi.jobs")
MPIRUN = Path(sys.executable).parent / "mpirun"
CONFORMANCE = [ROOT / "tests" / "conformance" / f"test_{name}.py" for name in ("law", "finite", "state")]
QUICK = "leaves_no_trace or bytes_of_every_step"


def mpirun(size: int, *command: str | Path, timeout_s: float = 280) -> subprocess.CompletedProcess[str]:
    launchers = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in launchers}
    return subprocess.run(
        [str(MPIRUN), "-n", str(size), sys.executable, *map(str, command)],
        env={**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


METHODS = {2: ("plain", "qsgd:bits=4", "powersgd"), 3: ("topk", "choco", "fixed_point")}
"""What DDP trains with, between so many ranks."""


@cache
def answers(size: int, backend: str) -> dict[str, list[Any]]:
    """Of every job, what each rank answers, in rank order. One mpirun for all: starting takes longest."""
    jobs = [f"training={spec}" for spec in METHODS[size]]
    jobs += ["collectives", "requests"] * (backend == "mpi4py")
    done = mpirun(size, *JOBS, backend, *jobs)
    assert done.returncode == 0, done.stdout + done.stderr
    told = sorted(
        map(json.loads, re.findall(r"^{.*", done.stdout, re.MULTILINE)), key=lambda one: one["rank"]
    )
    return {job: [one["answer"] for one in told if one["job"] == job] for job in jobs}


def test_the_conformance_tests_pass_over_mpi_with_the_bits_of_lock_step() -> None:
    """All of it where ``DISTCOMP_NIGHTLY`` is set; otherwise every method and setting for several steps, one
    with a NaN."""
    whole = bool(os.environ.get("DISTCOMP_NIGHTLY"))
    size, chosen = (4, []) if whole else (3, ["-k", QUICK])
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "tests.transports.mpi.mirror", "--timeout=240"]
    done = mpirun(size, "-m", "pytest", *options, *chosen, *CONFORMANCE, timeout_s=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"[1-9]\d passed", done.stdout)
    assert re.search(r"carried [1-9]\d+: AllGather AllReduce AllToAll .*Broadcast", done.stdout), done.stdout


@pytest.mark.parametrize("size", [2, 3])
def test_every_collective_brings_what_it_should(size: int) -> None:
    told = answers(size, "mpi4py")["collectives"]
    assert len(told) == size
    for right in told:
        assert len(right) > 35
        assert [name for name, good in right.items() if not good] == []


@pytest.mark.parametrize("size", [2, 3])
def test_reduce_scatter_and_the_uneven_all_to_all_bring_what_they_should(size: int) -> None:
    told = answers(size, "mpi4py")["requests"]
    assert len(told) == size
    for right in told:
        assert len(right) == 12
        assert [name for name, good in right.items() if not good] == []


@pytest.mark.parametrize(
    ("size", "spec"), [*((2, spec) for spec in METHODS[2]), (3, "choco"), (3, "fixed_point")]
)
def test_ddp_learns_the_same_over_mpi_as_over_gloo(size: int, spec: str) -> None:
    """Between two ranks, between neighbours and of integers every sum has but one value: the same bits."""
    over_mpi, over_gloo = (answers(size, backend)[f"training={spec}"] for backend in ("mpi4py", "gloo"))
    assert len(over_mpi) == size
    assert over_mpi == over_gloo
    assert all(one["alike"] or spec == "choco" for one in over_mpi)
    assert (over_mpi[0]["sent_bytes"] > 0) == (spec != "plain")


def test_three_ranks_hold_one_model() -> None:
    told = answers(3, "mpi4py")["training=topk"]
    assert len(told) == 3
    assert all(one["alike"] for one in told)
    assert len({one["weights"] for one in told}) == 1


def test_a_rank_that_stops_is_named_and_the_job_ends() -> None:
    done = mpirun(3, *JOBS, "mpi4py", "struck", timeout_s=120)
    assert done.returncode != 0
    told = [json.loads(line) for line in re.findall(r"^{.*", done.stdout, re.MULTILINE)]
    assert told, done.stdout + done.stderr
    assert all("rank 1 died or hangs" in one["answer"] for one in told), told


def test_every_call_dtype_and_shape_between_one_to_four_ranks() -> None:
    """What tests/calls asks over Gloo: in groups of one, two, three and all four ranks of one job."""
    done = mpirun(4, *JOBS, "mpi4py", "calls")
    assert done.returncode == 0, done.stdout + done.stderr
    told = {
        one["rank"]: one["answer"] for one in map(json.loads, re.findall(r"^{.*", done.stdout, re.MULTILINE))
    }
    assert sorted(told) == [0, 1, 2, 3]
    for rank, found in told.items():
        assert {job: wrong for job, wrong in found.items() if wrong} == {}
        each = 3 + len(test_calls.CODECS)
        assert len(found) == sum(each + 5 * (size > 1) for size in (1, 2, 3, 4) if rank < size), sorted(found)


def test_a_process_that_mpirun_did_not_start_is_told_so() -> None:
    script = """
from types import SimpleNamespace
from distcomp.transports.mpi.group import create_group
create_group(SimpleNamespace(global_ranks_in_group=[], group_size=2, group_rank=1))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert "start it with mpirun -n 2" in done.stderr


@pytest.mark.parametrize("imports", ["distcomp, torch", "torch"])
def test_torch_knows_the_backend_in_whatever_order_it_is_imported(imports: str) -> None:
    script = f"import {imports}; print('mpi4py' in torch.distributed.Backend.backend_list)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
