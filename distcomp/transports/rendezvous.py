"""``init_process_group`` under any launcher: where the ranks meet, when nobody says it as torchrun does."""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from distcomp.errors import DistcompError
from distcomp.process_environment import ProcessEnvironment, read_environment
from distcomp.transports.mpi.library import library
from distcomp.transports.mpi.progress import take_off
from distcomp.transports.types import HashStore, PrefixStore, Store, TCPStore

LOOPBACK = "127.0.0.1"
OF_MPI = ("Open MPI", "MPICH")


def init_process_group(backend: str = "gloo", *, timeout_s: float = 300.0) -> ProcessEnvironment:
    """As ``torch.distributed.init_process_group``, under whichever launcher started this process.

    Reads torchrun, horovodrun, mpirun (MPICH, Open MPI) and srun; Ray and Lightning have made the group
    already, which is then kept. Alone, the world has one rank. Afterwards the environment says what
    torchrun would say (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``, ``MASTER_PORT``), for
    others to read.

    Args:
        backend: ``"gloo"``, ``"nccl"``, or ``"mpi4py"``: MPI on a torch that was built without it.
        timeout_s: how long to wait for all ranks to come.

    Raises:
        DistcompError: nobody says where the ranks meet: set ``MASTER_ADDR`` and ``MASTER_PORT``; or the port
            is taken on the host of rank 0.
    """
    here = read_environment()
    if dist.is_initialized():
        return here
    patience = timedelta(seconds=timeout_s)
    store = _store(here, patience)
    os.environ.update(
        RANK=str(here.rank), WORLD_SIZE=str(here.size),
        LOCAL_RANK=str(here.local_rank), LOCAL_WORLD_SIZE=str(here.local_size),
    )  # fmt: skip
    if store is None:
        dist.init_process_group(backend, timeout=patience)  # torchrun has said everything
    else:
        dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.size, timeout=patience)
    return here


def _store(here: ProcessEnvironment, patience: timedelta) -> Store | None:
    """Where the ranks meet; None where torch's own way finds it in the environment."""
    if here.size == 1 and "MASTER_ADDR" not in os.environ:
        return HashStore()
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        if here.launcher == "torchrun":
            return None
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return _store_at(host, port, here, patience)
    if here.launcher in OF_MPI:
        return _store_by_mpi(here, patience)
    host, port = _meeting_place(here, os.environ)
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
    # where another job came to the same number, its ranks and these share the port but no key
    return PrefixStore(f"distcomp/{_job(os.environ)}", _store_at(host, port, here, patience))


def _store_at(host: str, port: int, here: ProcessEnvironment, patience: timedelta) -> Store:
    try:
        return TCPStore(host, port, here.size, here.rank == 0, patience)
    except dist.DistNetworkError as error:
        if here.rank > 0 or "EADDRINUSE" not in str(error):
            raise
        raise DistcompError(
            f"port {port}, where rank 0 listens for the others, is taken by another program on this host; "
            "set MASTER_PORT to a free port, the same for all ranks"
        ) from None


def _store_by_mpi(here: ProcessEnvironment, patience: timedelta) -> Store:
    """Rank 0 listens on a port that is free, and tells the others over MPI."""
    world = library().COMM_WORLD
    if (world.rank, world.size) != (here.rank, here.size):
        raise DistcompError(
            f"mpirun says rank {here.rank} of {here.size}, but mpi4py's library sees {world.rank} of "
            f"{world.size}: they are of two MPIs; use the mpirun that lies beside python (pip install mpich)"
        )
    host = os.environ.get("MASTER_ADDR", LOOPBACK if here.on_one_host else socket.gethostname())
    address = bytearray(256)
    if here.rank == 0:
        store = TCPStore(host, 0, here.size, True, patience, wait_for_workers=False)
        address[:] = f"{host} {store.port}".encode().ljust(len(address))
    take_off([world.Ibcast(address, 0)], address).wait(patience.total_seconds())
    host, port = address.decode().split()
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=port)
    if here.rank == 0:
        return store
    return TCPStore(host, int(port), here.size, False, patience)


def _meeting_place(here: ProcessEnvironment, given: Mapping[str, str]) -> tuple[str, int]:
    """The host of rank 0, and a port that the job's own number chooses: nobody can ask anybody yet."""
    port = given.get("MASTER_PORT")
    chosen = int(port) if port else 20_000 + zlib.crc32(_job(given).encode()) % 12_000
    if "MASTER_ADDR" in given:
        return given["MASTER_ADDR"], chosen
    if here.on_one_host and here.launcher != "torchrun":
        return LOOPBACK, chosen
    nodes = given.get("SLURM_STEP_NODELIST") if here.launcher == "srun" else None
    if not nodes:
        raise DistcompError(
            f"{here.launcher} started {here.size} ranks but does not say where they meet; set MASTER_ADDR to "
            "the host of rank 0 and MASTER_PORT to a free port on it, the same for all"
        )
    return first_host(nodes), chosen


def _job(given: Mapping[str, str]) -> str:
    return "".join(given.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", HOROVOD_PORT))


HOROVOD_PORT = "HOROVOD_GLOO_RENDEZVOUS_PORT"


def first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts: ``gpu[07-09,12],big1`` begins with ``gpu07``."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise DistcompError(f"Slurm's list of hosts {nodes!r} names none; set MASTER_ADDR and MASTER_PORT")
    return "".join(part or "" for part in match.groups())
