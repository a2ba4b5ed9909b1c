"""Which backends can carry a request on this machine, and which does in a given group?"""

from __future__ import annotations

import importlib.util

import torch.distributed as dist

from distcomp.errors import DistcompError
from distcomp.private_torch import timeout_of
from distcomp.transports import mpi
from distcomp.transports.gloo_p2p import GlooP2P
from distcomp.transports.heartbeat import Heartbeat
from distcomp.transports.mpi.group import MpiGroup
from distcomp.transports.mpi.transport import MPITransport
from distcomp.transports.pair import Couple
from distcomp.transports.sockets import connected
from distcomp.transports.torchdist import TorchDist
from distcomp.transports.types import Store

mpi.register()  # where torch was told to load no extension by itself (TORCH_DEVICE_BACKEND_AUTOLOAD=0)


def available() -> dict[str, bool]:
    """Each backend of torch.distributed that this build of torch may have, and whether it has it."""
    if not dist.is_available():
        return {"gloo": False, "nccl": False, "mpi": False, mpi.BACKEND: False}
    return {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "mpi": dist.is_mpi_available(),
        mpi.BACKEND: importlib.util.find_spec("mpi4py") is not None,
    }


def pair_of(
    group: dist.ProcessGroup, heartbeat: Heartbeat, timeout_s: float, sender: int, receiver: int
) -> Couple:
    """What carries messages from one of the group's ranks to another, beside all else.

    Raises DistcompError over a backend that cannot tell them from all else.
    """
    lane = 1 + (sender < receiver)  # of either direction
    if isinstance(group, MpiGroup):
        return Couple(MPITransport(group.comm, heartbeat, timeout_s, lane), sender, receiver)
    if dist.get_backend(group) != "gloo":
        raise DistcompError(
            f"send and recv go over Gloo and MPI, and this group is of {dist.get_backend(group)}; give them "
            'torch.distributed.new_group(backend="gloo")'
        )
    return Couple(GlooP2P(group, heartbeat, timeout_s, lane), sender, receiver)


def carrier_of(
    group: dist.ProcessGroup, heartbeat: Heartbeat, timeout_s: float, store: Store | None
) -> GlooP2P | MPITransport | TorchDist:
    """The transport that is quickest over the group's backend. ``store``: where its ranks may meet, for
    connections beside the backend's own.

    Raises PeerLost where a rank does not come to meet.
    """
    if isinstance(group, MpiGroup):
        return MPITransport(group.comm, heartbeat, timeout_s)
    if dist.get_backend(group) != "gloo":
        return TorchDist(group, heartbeat, timeout_s)
    return (
        GlooP2P(group, heartbeat, timeout_s)
        if store is None
        else connected(group, heartbeat, timeout_s, store)
    )


def patience_s(group: dist.ProcessGroup) -> float:
    """How long the group itself waits for a peer."""
    return (timeout_of(group) or dist.default_pg_timeout).total_seconds()
