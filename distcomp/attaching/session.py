"""What an attached model's ranks share: agreed settings, a process group of their own, heartbeat, ledger."""

from __future__ import annotations

import atexit
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distcomp.attaching.groups import pool_of
from distcomp.errors import DistcompError, PeerLost
from distcomp.kernels import memory
from distcomp.recording import Recorder
from distcomp.runtime.channel import Channel, Transport
from distcomp.runtime.ledger import Ledger
from distcomp.transports.agreement import Agreement
from distcomp.transports.backends import carrier_of, pair_of
from distcomp.transports.bounded import Result, ask_store, bounded
from distcomp.transports.ending import wait_for_threads
from distcomp.transports.gloo_p2p import GlooP2P
from distcomp.transports.heartbeat import Heartbeat
from distcomp.transports.mpi.transport import MPITransport
from distcomp.transports.resilient_p2p import CutOff, Opened, ResilientP2P
from distcomp.transports.throttle import SlowLink, throttled
from distcomp.transports.torchdist import TorchDist
from distcomp.transports.types import Store

Carrier = TorchDist | GlooP2P | MPITransport | ResilientP2P

atexit.register(wait_for_threads)  # before the handlers of sessions, which Python calls first at the end


class Meeting:
    """The ranks of a process group about to share a line, and what they say to one another first.

    Every call of ``attach`` that knows its ranks is one, also one that is then refused: ranks count alike.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_s: float) -> None:
        self.group = group
        self.timeout_s = timeout_s
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.store: Store = pool_of(group).store(group)
        count = f"distcomp/attached/{self.rank}"  # every rank counts alike in a group
        self.name = f"attach{ask_store(lambda: self.store.add(count, 1))}"
        self.agreement = Agreement(self.store, self.rank, self.size, self.name, timeout_s)

    @contextmanager
    def refusals_told(self) -> Iterator[None]:
        """Where this rank refuses to attach, the others, who may wait for it, learn why."""
        try:
            yield
        except DistcompError as error:
            self.agreement.refuse(str(error))
            raise


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
    _link: SlowLink | None
    _give_back: Callable[[], None]
    group: dist.ProcessGroup
    """The process group of the method's own, whose timeout is ``timeout_s``."""

    @staticmethod
    def open(
        meeting: Meeting,
        settings: Mapping[str, str],
        details: Mapping[str, Sequence[str]],
        edges: frozenset[tuple[int, int]] = frozenset(),
    ) -> Session:
        """Agree on the settings with every rank, then open the line.

        Neighbours along ``edges`` exchange over connections of their own, and go on when one of them dies.

        Raises SettingsMismatch or PeerLost on every rank, within ``timeout_s``.
        """
        rank, size, timeout_s = meeting.rank, meeting.size, meeting.timeout_s
        parent = meeting.group
        pool = pool_of(parent)
        everyone = meeting.agreement.agree({**settings, **pool.proposal()}, details)
        heartbeat = Heartbeat(meeting.store, rank, size, meeting.name, timeout_s=timeout_s)
        try:
            number, group = _named(heartbeat, timeout_s, lambda: pool.take(parent, everyone, timeout_s))
            # an edge that breaks must not take the others with it: they stay beside Gloo's connections
            place = None if edges else meeting.store
            transport: Carrier = _named(
                heartbeat, timeout_s, lambda: carrier_of(group, heartbeat, timeout_s, place)
            )
            if edges and not isinstance(transport, MPITransport):  # mpirun ends every rank when one dies
                plain = transport
                transport = _named(
                    heartbeat,
                    timeout_s,
                    lambda: ResilientP2P(plain, edges, meeting.store, heartbeat, timeout_s),
                )
        except BaseException:
            heartbeat.close()
            raise
        digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).digest()
        ledger, link = Ledger(), SlowLink.from_env()
        channel = Channel(throttled(transport, link), int.from_bytes(digest[:4], "little"), ledger)
        heartbeat.progress = lambda: channel.exchange
        atexit.register(heartbeat.close)
        recorder = Recorder.from_env(rank)

        def give_back() -> None:
            pool.free[number] = group

        return Session(
            rank, size, channel, ledger, recorder, timeout_s, heartbeat, transport, link, give_back, group
        )

    def messages(self, sender: int, receiver: int) -> Channel:
        """A channel for what one rank sends another (global ranks, this one either): a world of two, beside
        :attr:`channel`.

        The sender is rank 0 there. Raises DistcompError over a backend without such.
        """
        places = [dist.get_group_rank(self.group, rank) for rank in (sender, receiver)]
        pair = pair_of(self.group, self._heartbeat, self.timeout_s, *places)
        return Channel(throttled(pair, self._link), self.channel.fingerprint, self.ledger)

    def channel_over(self, transport: Transport) -> Channel:
        """A channel over another transport than the session's own, whose bytes count as its own."""
        return Channel(throttled(transport, self._link), self.channel.fingerprint, self.ledger)

    @property
    def name(self) -> str:
        """Of this attachment: the same on every rank, and of no other one."""
        return self._heartbeat.name

    @property
    def lost(self) -> Mapping[int, str]:
        """Ranks without which the line goes on, and why."""
        return self._transport.lost if isinstance(self._transport, ResilientP2P) else {}

    @property
    def present(self) -> int:
        """How many ranks took part in what all were last asked."""
        return self._transport.present if isinstance(self._transport, ResilientP2P) else self.size

    def opened(self) -> list[Opened]:
        """Edges to neighbours who were lost, opened again before the next exchange with neighbours.

        Raises CutOff where this rank has trained apart from most.
        """
        if not isinstance(self._transport, ResilientP2P):
            return []
        return self._transport.opened(self.channel.exchange + 1)

    def come_back(self, error: CutOff) -> Opened:
        """Wait to be taken in again by a neighbour, with whom the next exchange is then made.

        Raises PeerLost where none does within ``timeout_s``.
        """
        assert isinstance(self._transport, ResilientP2P)
        number, edge = self._transport.come_back(error)
        self.channel.exchange = number - 1  # as many as the others have begun
        return edge

    def take_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Copy rank 0's tensors, bit for bit, into those of the same shapes here.

        Not counted in the ledger, as it is no message of the method's.

        Raises PeerLost naming the rank that does not come.
        """
        if self.size == 1:
            return
        self.channel.exchange += 1  # tells others how far this rank has come, should it be missed
        own = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors]
        try:
            (wire,) = self._transport.broadcast(torch.cat(own), 0, None).wait()
        except RuntimeError as error:
            raise self._heartbeat.diagnose(error) from error
        for tensor, piece in zip(tensors, torch.split(wire, [one.numel() for one in own]), strict=True):
            tensor.data.copy_(piece.clone().view(tensor.dtype).view_as(tensor))

    def diagnose(self, error: Exception) -> PeerLost:
        """The error that names who is lost, where an exchange has failed with ``error``."""
        return self._heartbeat.diagnose(error)

    def leave_note(self, sentence: str) -> None:
        """Tell those who will wait for this rank in vain why it does not come."""
        self._heartbeat.leave_note(sentence)

    def close(self, whole: bool = True) -> None:
        """Say goodbye. ``whole``: every exchange that was begun has ended; others may use the line."""
        self._transport.close()
        memory.give_back()
        if whole and not self._heartbeat.diagnosed:
            self._give_back()
        self._heartbeat.close()
        atexit.unregister(self._heartbeat.close)


def _named(heartbeat: Heartbeat, timeout_s: float, connect: Callable[[], Result]) -> Result:
    """What ``connect`` returns. Raises PeerLost naming the rank that does not come to connect."""
    try:
        return bounded(connect, timeout_s + 1.0, f"a connection was not made within timeout_s={timeout_s:g}")
    except (RuntimeError, PeerLost) as error:
        raise heartbeat.diagnose(error) from error
