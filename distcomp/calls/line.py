"""What the calls of one process group go over: watched by a heartbeat, counted by a ledger."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from distcomp.attaching.session import Meeting, Session
from distcomp.calls.work import Work
from distcomp.collectives import Rounds
from distcomp.errors import DistcompError, PeerLost
from distcomp.layout import Layout
from distcomp.methods.base import AggregateResult, State, StepContext
from distcomp.randomness import Key
from distcomp.runtime import driver
from distcomp.runtime.channel import Channel
from distcomp.runtime.executor import Executor
from distcomp.runtime.unanimous import unanimous
from distcomp.transports.backends import patience_s
from distcomp.transports.types import ProcessGroup

REMEDY = "call it on every rank alike"
NOTHING = Layout(())
"""A call's tensors are no parameters."""

Asked = Callable[[StepContext], Rounds[Tensor]]
"""What a call asks of the other ranks, and what it makes of the answers: one flat tensor."""


@dataclass(frozen=True)
class Call:
    """One call as an exchange: first the ranks compare what they ask.

    ``exact``: what is not finite arrives by itself. ``ranks``: of a message, who sends it and to whom (global
    ranks); None for all. ``agreed``: the ranks have compared it already.
    """

    words: str
    asked: Asked
    exact: bool
    ranks: tuple[int, int] | None = None
    agreed: bool = False

    @property
    def propagates_nonfinite(self) -> bool:
        return self.exact

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        if not self.agreed:
            yield from unanimous(self.words, REMEDY, x.device, self.ranks)
        answer = yield from self.asked(context)
        return AggregateResult(answer, lambda: answer, state)


@dataclass
class Lane:
    """Calls that wait for one another: where they go, on what they are carried, how many there were."""

    channel: Channel
    executor: Executor
    device: torch.device
    calls: int = 0


class CallLine:
    """The calls of one group, in order, on a thread of their own (a stream, on a GPU), and messages between
    two of its ranks, those of each direction on another."""

    def __init__(self, group: ProcessGroup, timeout_s: float | None) -> None:
        patience = patience_s(group) if timeout_s is None else timeout_s
        self.session = Session.open(Meeting(group, patience), {"line": "calls"}, {})
        self._lanes: dict[tuple[int, int] | None, Lane] = {}
        """By sender and receiver; None for the calls of all ranks."""
        self._error: PeerLost | None = None
        self.end: Callable[[], object] = self.close
        """:meth:`close`, once: by whoever disconnects, or when the group goes."""

    def begin(self, call: Call, x: Tensor, finish: Callable[[Tensor], None]) -> Work:
        """Begin a call on ``x``; ``finish`` is given the answer when it is waited for."""
        if self._error is not None:
            raise self._error
        lane = self._lane(call.ranks, x.device)
        transport, number = lane.channel.transport, lane.calls
        key = Key.of("calls", number) if call.ranks is None else Key.of("messages", *call.ranks, number)
        context = StepContext(transport.rank, transport.size, NOTHING, number, key)
        lane.calls += 1
        with torch.no_grad():
            exchange = driver.exchange(call, x, {}, context, lane.executor)

        def over() -> None:
            try:
                answer = exchange.result().estimate
            except PeerLost as error:
                self._error = error if call.ranks is None else PeerLost(f"{call.words}: {error}")
                raise self._error from error
            finish(answer)

        return Work(over)

    def _lane(self, ranks: tuple[int, int] | None, device: torch.device) -> Lane:
        if ranks not in self._lanes:
            channel = self.session.channel if ranks is None else self.session.messages(*ranks)
            self._lanes[ranks] = Lane(channel, Executor(channel, device, beside=True), device)
        lane = self._lanes[ranks]
        if device != lane.device:
            raise DistcompError(
                f"the tensor lies on {device}, and calls of this group are of tensors on {lane.device}; "
                "move it there, or use another group"
            )
        return lane

    def close(self) -> None:
        """End the threads, after what they carry, and say goodbye."""
        for lane in self._lanes.values():
            lane.executor.close()
        self.session.close(whole=self._error is None)


_LINES: WeakKeyDictionary[ProcessGroup, CallLine] = WeakKeyDictionary()


def connect(group: ProcessGroup | None = None, timeout_s: float | None = None) -> None:
    """Open the line of a group's calls. Call it on every rank of it; the first call does it otherwise.

    ``timeout_s``: how long a call waits for a rank; the group's own timeout by default.

    Raises PeerLost naming a rank that does not come, DistcompError where the line is open with another
    timeout.
    """
    line_of(group, timeout_s)


def disconnect(group: ProcessGroup | None = None) -> None:
    """Close the line of a group's calls, before the group is destroyed. The next call opens another."""
    line = _LINES.pop(group_of(group), None)
    if line is not None:
        line.end()


def sent_bytes(group: ProcessGroup | None = None) -> Mapping[str, int]:
    """Bytes that this rank has sent by calls of a group, by kind."""
    line = _LINES.get(group_of(group))
    return {} if line is None else dict(line.session.ledger.sent_bytes)


def line_of(group: ProcessGroup | None, timeout_s: float | None = None) -> CallLine:
    """The line of a group's calls, opened when first asked for."""
    known = group_of(group)
    if known not in _LINES:
        line = _LINES[known] = CallLine(known, timeout_s)
        line.end = weakref.finalize(known, line.close)
    line = _LINES[known]
    if timeout_s not in (None, line.session.timeout_s):
        raise DistcompError(
            f"calls of this group wait {line.session.timeout_s:g} s already, not {timeout_s:g} s; connect "
            "before the first call, or disconnect first"
        )
    return line


def open_line(group: ProcessGroup | None) -> CallLine:
    """As :func:`line_of`, for calls that not all ranks of the group make, which cannot open its line."""
    known = group_of(group)
    if known not in _LINES and dist.get_world_size(known) > 2:
        raise DistcompError(
            "two ranks alone cannot open the line of a group of more; call distcomp.calls.connect(group) on "
            "every rank of it before the first send or recv"
        )
    return line_of(known)


def group_of(group: ProcessGroup | None) -> ProcessGroup:
    """The group, or the default one. Raises DistcompError where there is none, or this rank is not in it."""
    if not dist.is_initialized():
        raise DistcompError("there is no process group; call torch.distributed.init_process_group first")
    known = dist.group.WORLD if group is None else group
    if known is None or dist.get_rank(known) < 0:
        raise DistcompError(f"rank {dist.get_rank()} is none of the group's; call on its ranks only")
    return known
