"""What an attached model's ranks share: agreed settings, a process group of their own, heartbeat, ledger."""

from __future__ import annotations

import atexit
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import nn

from distcomp.attaching.target import Target
from distcomp.recording import Recorder
from distcomp.runtime.channel import Channel
from distcomp.runtime.ledger import Ledger
from distcomp.transports.backends import carrier_of
from distcomp.transports.gloo_p2p import GlooP2P
from distcomp.transports.heartbeat import Heartbeat, agree
from distcomp.transports.mpi.transport import MPITransport
from distcomp.transports.resilient_p2p import ResilientP2P
from distcomp.transports.throttle import throttled
from distcomp.transports.torchdist import TorchDist

_GROUPS: WeakKeyDictionary[nn.Module, dist.ProcessGroup] = WeakKeyDictionary()


Carrier = TorchDist | GlooP2P | MPITransport | ResilientP2P


@dataclass
class Session:
    """Open while a method is attached."""

    rank: int
    size: int
    channel: Channel
    ledger: Ledger
    recorder: Recorder | None
    timeout_s: float
    """How long a peer is waited for."""
    _heartbeat: Heartbeat
    _transport: Carrier

    @staticmethod
    def open(
        target: Target,
        settings: Mapping[str, str],
        timeout_s: float,
        edges: frozenset[tuple[int, int]] = frozenset(),
    ) -> Session:
        """Agree on the settings with every rank, then open the line.

        Neighbours along ``edges`` exchange over connections of their own, and go on when one of them dies.

        Raises SettingsMismatch or PeerLost on every rank, within ``timeout_s``.
        """
        parent = target.group
        rank, size = dist.get_rank(parent), dist.get_world_size(parent)
        store = parent.get_group_store()
        name = f"attach{store.add(f'distcomp/attached/{rank}', 1)}"  # every rank counts alike in a group
        agree(store, rank, size, name, settings, timeout_s)
        group = _own_group(target, timeout_s)
        heartbeat = Heartbeat(store, rank, size, name)
        transport: Carrier = carrier_of(group, heartbeat, timeout_s)
        if edges and not isinstance(transport, MPITransport):  # mpirun ends every rank when one dies
            transport = ResilientP2P(transport, edges, store, heartbeat, timeout_s)
        digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).digest()
        ledger = Ledger()
        channel = Channel(throttled(transport), int.from_bytes(digest[:4], "little"), ledger)
        atexit.register(heartbeat.close)
        return Session(rank, size, channel, ledger, Recorder.from_env(rank), timeout_s, heartbeat, transport)

    @property
    def name(self) -> str:
        """Of this attachment: the same on every rank, and of no other one."""
        return self._heartbeat.name

    @property
    def lost(self) -> frozenset[int]:
        """Ranks that are known to be gone, where the line goes on without them."""
        return frozenset(self._transport.lost) if isinstance(self._transport, ResilientP2P) else frozenset()

    def leave_note(self, sentence: str) -> None:
        """Tell those who will wait for this rank in vain why it does not come."""
        self._heartbeat.leave_note(sentence)

    def close(self) -> None:
        self._transport.close()
        self._heartbeat.close()
        atexit.unregister(self._heartbeat.close)


def _own_group(target: Target, timeout_s: float) -> dist.ProcessGroup:
    """A process group for distcomp's exchanges alone, one per model: nobody else's collectives come
    between."""
    if target.key not in _GROUPS:
        parent = target.group
        ranks = [dist.get_global_rank(parent, rank) for rank in range(dist.get_world_size(parent))]
        group = dist.new_group(
            ranks,
            timeout=timedelta(seconds=timeout_s + 10),
            backend=dist.get_backend(parent),
            use_local_synchronization=True,
        )
        assert isinstance(group, dist.ProcessGroup)
        _GROUPS[target.key] = group
    return _GROUPS[target.key]
