"""Rank and world size, as each launcher says them."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest

from distcomp.errors import DistcompError
from distcomp.process_environment import ProcessEnvironment, read_environment
from distcomp.transports.rendezvous import _meeting_place, _store, first_host
from distcomp.transports.types import TCPStore

TOLD = {
    "torchrun": {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    "horovodrun": {
        "HOROVOD_RANK": "3", "HOROVOD_SIZE": "4", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "2",
    },
    "Open MPI": {
        "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    },
    "MPICH": {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
    "srun": {
        "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    },
}  # fmt: skip


@pytest.mark.parametrize("launcher", TOLD)
def test_each_launcher_is_read(launcher: str) -> None:
    assert read_environment(TOLD[launcher]) == ProcessEnvironment(3, 4, 1, 2, launcher)
    assert not read_environment(TOLD[launcher]).on_one_host


def test_nobody_launched_is_one_of_one() -> None:
    assert read_environment({}) == ProcessEnvironment(0, 1, 0, 1, "none")


def test_a_batch_script_of_slurm_is_alone() -> None:
    """It sees the numbers of the job; only what srun starts is a rank."""
    assert read_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}).size == 1


def test_mpirun_inside_slurm_is_read_as_mpirun() -> None:
    assert read_environment({**TOLD["srun"], "PMI_RANK": "1", "PMI_SIZE": "2"}).launcher == "MPICH"


@pytest.mark.parametrize("wrong", [{"RANK": "x", "WORLD_SIZE": "2"}, {"PMI_RANK": "2", "PMI_SIZE": "2"}])
def test_words_that_make_no_sense_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(DistcompError, match=next(iter(wrong))):
        read_environment(wrong)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[07-09,12],big1", "gpu07"), ("a[1-2]-ib,b", "a1-ib")],
)
def test_the_first_of_slurms_hosts(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_where_ranks_meet() -> None:
    srun = {**TOLD["srun"], "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "41"}
    host, port = _meeting_place(read_environment(srun), srun)
    assert (host, _meeting_place(read_environment(srun), {**srun, "SLURM_JOB_ID": "42"})[1] != port) == (
        "gpu07",
        True,
    )
    told = {**TOLD["horovodrun"], "MASTER_ADDR": "host0", "MASTER_PORT": "1234"}
    assert _meeting_place(read_environment(told), told) == ("host0", 1234)
    with pytest.raises(DistcompError, match="set MASTER_ADDR"):
        _meeting_place(read_environment(TOLD["horovodrun"]), TOLD["horovodrun"])


PATIENCE = timedelta(seconds=5)


def test_a_port_that_another_program_holds_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    held = TCPStore("127.0.0.1", 0, None, True, PATIENCE, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(held.port))
    with pytest.raises(DistcompError, match=f"port {held.port}, .* is taken .* set MASTER_PORT"):
        _store(ProcessEnvironment(0, 2, 0, 2, "srun"), PATIENCE)


def test_a_rank_that_comes_to_another_jobs_store_overwrites_none_of_its_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two jobs on one host came to the same port: the later one's rank 1 finds the earlier one's store."""
    theirs = TCPStore("127.0.0.1", 0, None, True, PATIENCE, wait_for_workers=False)
    monkeypatch.setattr(os, "environ", {"SLURM_JOB_ID": "41"})
    monkeypatch.setattr(
        "distcomp.transports.rendezvous._meeting_place", lambda *_: ("127.0.0.1", theirs.port)
    )
    ours = _store(ProcessEnvironment(1, 2, 1, 2, "srun"), PATIENCE)
    assert ours is not None
    theirs.set("rank 1", "theirs")
    ours.set("rank 1", "ours")
    assert (theirs.get("rank 1"), ours.get("rank 1")) == (b"theirs", b"ours")
