"""The order in which the buckets of one iteration exchange.

Requests are started in an order that is a pure function of (bucket, round), so every rank starts the same
ones in the same order, whatever its timing; the transport carries them in that order. The order runs along
diagonals, ``b0.r0, b1.r0, b0.r1, b2.r0, b1.r1, b0.r2, ...``: while a request of one bucket is on the wire,
the next bucket is encoded and the last one re-encoded. A request that says how long the next one is
(``leads``) and the next one count as one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

from torch.profiler import record_function

from distcomp.private_torch import profiler_runs
from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.channel import Channel, OpenRequest


class PhaseSpan(NamedTuple):
    """What was done from one moment to another; phases are encode, recode, wait, decode, and wire (a request
    under way)."""

    phase: str
    begin_s: float
    end_s: float
    bucket: int = 0
    round: int = 0


@dataclass
class Timeline:
    """When what was done in one iteration, in seconds of :func:`time.perf_counter`."""

    spans: list[PhaseSpan] = field(default_factory=list)

    def seconds(self, phase: str, after_s: float = float("-inf")) -> float:
        """Time during which a phase was under way after a moment; what overlaps itself counts once."""
        total_s, reached_s = 0.0, after_s
        for begin, end in sorted((one.begin_s, one.end_s) for one in self.spans if one.phase == phase):
            total_s += max(0.0, end - max(begin, reached_s))
            reached_s = max(reached_s, end)
        return total_s

    @property
    def exchange_s(self) -> float:
        """From the first encode to the last decode."""
        if not self.spans:
            return 0.0
        return max(one.end_s for one in self.spans) - min(one.begin_s for one in self.spans)


@dataclass
class Running:
    """An exchange in the pipeline, and what to do when it is over."""

    aggregation: Aggregation
    done: Callable[[], None]
    open_request: OpenRequest | None = None
    rounds: int = 0
    bucket: int = 0

    @property
    def over(self) -> bool:
        """Whether its result is there."""
        return self.aggregation.result is not None


BucketCarrier = Generator[int, Running | None, None]
"""Yields the index of the bucket that it needs, is sent it."""


def request_order() -> Iterator[tuple[int, int]]:
    """(bucket, round) along diagonals, without end."""
    diagonal = 0
    while True:
        for round_ in range(diagonal + 1):
            yield diagonal - round_, round_
        diagonal += 1


def drive(channel: Channel, timeline: Timeline) -> BucketCarrier:
    """Carry all exchanges of an iteration.

    A generator: it yields the index of a bucket when it needs it, and is sent its exchange, or None when
    there are no more buckets. Whoever drives it decides how to wait (a thread blocks; a hook on a CUDA stream
    comes back later).
    """
    buckets: list[Running] = []
    last: int | None = None

    for bucket, round_ in request_order():
        if round_ == 0 and last is None:
            running = yield bucket
            if running is None:
                last = bucket
            else:
                running.bucket = bucket
                buckets.append(running)
        if last is not None and all(running.over for running in buckets):
            return
        if bucket >= len(buckets) or buckets[bucket].over:
            continue
        current = buckets[bucket]
        goes_on = True
        while goes_on:
            # Waited for only now, in the request's own turn: meanwhile other buckets were encoded and sent.
            if current.open_request is not None:
                with _range(current, bucket, "wait"):
                    _wait(current, timeline)
            with _range(current, bucket, "encode" if current.rounds == 0 else "decode"):
                under_way = _advance(current, channel, timeline)
            if under_way:
                assert current.open_request is not None
                # Here and nowhere else: in one order, ranks do not wait for each other forever.
                current.open_request.start()
            # What only says sizes is followed at once: the next bucket may not be there for long.
            goes_on = under_way and current.open_request is not None and current.open_request.leads


def _range(current: Running, bucket: int, phase: str) -> AbstractContextManager[object]:
    """``distcomp::<method>::<phase>`` in the trace of torch.profiler; nothing where none runs."""
    if not profiler_runs():
        return nullcontext()
    return record_function(f"distcomp::{current.aggregation.title}::{phase}", f"bucket {bucket}")


def _advance(current: Running, channel: Channel, timeline: Timeline) -> bool:
    """The arithmetic between two rounds: take the answer in, make the next request. False when the exchange
    is over."""
    aggregation = current.aggregation
    begin_s = time.perf_counter()
    answer = current.open_request.open(aggregation.watch) if current.open_request is not None else None
    request = aggregation.ask(answer)
    if request is not None:
        current.open_request = channel.prepare(request, aggregation.finite)
    phase = "decode" if request is None else "encode" if current.rounds == 0 else "recode"
    timeline.spans.append(PhaseSpan(phase, begin_s, time.perf_counter(), current.bucket, current.rounds))
    current.rounds += 1
    if request is None:
        current.done()
    return request is not None


def _wait(current: Running, timeline: Timeline) -> None:
    """Wait for the network; from here on the answer lies ready."""
    assert current.open_request is not None
    begin_s = time.perf_counter()
    current.open_request.wait()
    sent, place = current.open_request, (current.bucket, current.rounds - 1)
    timeline.spans.append(PhaseSpan("wait", begin_s, time.perf_counter(), *place))
    timeline.spans.append(PhaseSpan("wire", sent.started_s, sent.finished_s, *place))


class Drive:
    """The exchanges of one iteration, under way together: :meth:`add` one after the other, then :meth:`end`.

    One exchange by itself is the case of one bucket.
    """

    def __init__(self, channel: Channel) -> None:
        self.timeline = Timeline()
        self.aggregations: list[Aggregation] = []
        self._carrier = drive(channel, self.timeline)
        next(self._carrier)

    def add(self, aggregation: Aggregation, done: Callable[[], None] = lambda: None) -> None:
        """Begin one more; carry what comes before the one after it. ``done`` is called at its end."""
        self.aggregations.append(aggregation)
        self._carrier.send(Running(aggregation, done))

    def end(self) -> None:
        """There are no more: carry all of them to their ends."""
        try:
            self._carrier.send(None)
        except StopIteration:
            return
        raise RuntimeError("the pipeline asked for a bucket after the last one")
