"""Which rank is this process, and of how many? Launchers have variables of their own; they are read here."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from distcomp.errors import DistcompError


@dataclass(frozen=True)
class Launcher:
    """The variables in which a launcher gives a process its rank, the world size, and both on its host."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str


LAUNCHERS = (
    Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    Launcher("horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    Launcher(
        "Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher("MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)  # fmt: skip
"""In this order: mpirun inside a Slurm allocation sets its own variables beside Slurm's, which are those of
the one process that runs mpirun."""


@dataclass(frozen=True)
class ProcessEnvironment:
    """This process among all. ``local_rank`` chooses its GPU."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    launcher: str

    @property
    def on_one_host(self) -> bool:
        return self.local_size == self.size


def read_environment(environment: Mapping[str, str] | None = None) -> ProcessEnvironment:
    """What the launcher has set. A process without a launcher is rank 0 of 1.

    Raises DistcompError where a launcher's variables make no sense.
    """
    given = os.environ if environment is None else environment
    for launcher in LAUNCHERS:
        if launcher.rank in given and launcher.size in given:
            return _read(launcher, given)
    return ProcessEnvironment(0, 1, 0, 1, "none")


def _read(launcher: Launcher, given: Mapping[str, str]) -> ProcessEnvironment:
    try:
        rank, size = int(given[launcher.rank]), int(given[launcher.size])
        local_rank = int(given.get(launcher.local_rank, rank))
        local_size = int(re.split(r"[(,]", given.get(launcher.local_size, str(size)))[0])  # Slurm's "2(x3)"
    except ValueError as error:
        raise DistcompError(
            f"{launcher.name} says {launcher.rank}={given[launcher.rank]!r} and "
            f"{launcher.size}={given[launcher.size]!r} ({error}); give whole numbers, or unset both"
        ) from None
    if not 0 <= rank < size:
        raise DistcompError(
            f"{launcher.name} says {launcher.rank}={rank} and {launcher.size}={size}; "
            "a rank is at least 0 and below the world size: start the job anew"
        )
    return ProcessEnvironment(rank, size, local_rank, local_size, launcher.name)
