"""Who carries a request where MPI is the network? mpi4py, also as a backend of torch.distributed."""

from typing import Any

BACKEND = "mpi4py"


def register() -> None:
    """Make ``init_process_group("mpi4py")`` known to torch.distributed.

    torch calls this at the end of ``import torch``, by the entry point ``torch.backends``: the name is known
    whatever else a script imports, and in whatever order, and costs nothing until such a group is made.
    """
    import torch.distributed as dist

    if dist.is_available():
        dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu"])


def _create(options: Any, _: object) -> Any:
    from distcomp.transports.mpi.group import create_group

    return create_group(options)
