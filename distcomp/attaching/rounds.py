"""Models in training among workers that come and go: outer rounds, and how one who was away catches up.

Each worker keeps what all have in common (anchors, the state of the outer optimizer, buffers) as it was after
the last round, and hands it to whoever knocks, in the background. A worker that is new, or was closed out of
a round, takes it over and goes on in step with whoever handed it over: it comes to the next round at the same
step, with fewer steps behind it, and is weighed by what it saw.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from distcomp.attaching.handover import Handover, handed_over, read_handover
from distcomp.attaching.meeting_place import MeetingPlace
from distcomp.attaching.parameters import ParameterSync
from distcomp.attaching.session import Session
from distcomp.attaching.target import Target
from distcomp.averaging.base import FragmentState, InFlight
from distcomp.averaging.lateness import LATE_ROUNDS
from distcomp.averaging.periodic import Periodic
from distcomp.layout import FlatBuffer, Layout
from distcomp.methods.base import AggregateResult, StepContext
from distcomp.methods.scheduled import EXACT
from distcomp.randomness import Key
from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.pipeline import Drive, Timeline
from distcomp.schedule import whole
from distcomp.training import TrainingClock
from distcomp.transports.mesh import MemberLine, Mesh
from distcomp.transports.rounds import Missed, OuterRounds, Round


class RoundSync(ParameterSync):
    """Averages models in rounds of those who come, as ``periodic.on_failure`` says.

    On the wire, beside the exchanges of the averaging: what one who was away is handed, uncounted (8 bytes
    for each parameter with an outer momentum, 4 without).

    Raises PeerLost where nobody hands a newcomer anything within ``session.timeout_s``.
    """

    def __init__(
        self,
        target: Target,
        periodic: Periodic,
        session: Session,
        clock: TrainingClock,
        optimizer: Optimizer | None,
        seed: int,
        place: MeetingPlace,
    ) -> None:
        assert periodic.lateness is not None
        self._periodic, self._lateness = periodic, periodic.lateness
        self._own_steps = 0
        self._saw: float | None = None
        self._used: dict[str, float] = {}
        self._buffers = torch.empty(0, dtype=torch.float32)
        super().__init__(target, periodic, session, clock, optimizer, seed)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="distcomp-rounds")
        self._latest = self._handover(0)
        mesh = Mesh(place.store, place.me, self._answer)
        self._rounds = OuterRounds(
            place.store,
            mesh,
            self._lateness.quorum,
            self._lateness.grace_s,
            session.timeout_s,
            set(place.founders),
        )
        self._known = set(place.founders)
        if place.me not in place.founders:
            self._take_over(self._downloaded(0))

    def saw(self, samples: float) -> None:
        """Count what this worker has seen, in the place of its steps."""
        self._saw = (self._saw or 0.0) + samples

    def settle(self) -> None:
        self._own_steps += self._pending
        try:
            super().settle()
        except Missed as error:
            self.error = None
            self._catch_up(error)
        if self._rounds.number != self._latest.number and not any(f.in_flight for f in self._fragments):
            self._latest = self._handover(self._rounds.number)

    def finish(self) -> None:
        super().finish()
        self._latest = self._handover(self._rounds.number)

    def state_dict(self) -> dict[str, Any]:
        try:
            return super().state_dict()
        except Missed as error:  # what is under way is saved, too, and was held without this worker
            self._catch_up(error)
            return super().state_dict()

    def load_state_dict(self, saved: Any) -> None:
        super().load_state_dict(saved)
        self._latest = self._handover(self._rounds.number)

    def report(self) -> dict[str, Any]:
        about = {"worker": self._rounds.mesh.me, "workers": list(self._rounds.members)}
        lost = {"lost": sorted(self._rounds.lost)} if self._rounds.lost else {}
        return {**super().report(), **about, "rounds": self._rounds.number, **lost}

    def close(self) -> None:
        super().close()
        self._thread.shutdown(wait=True)
        self._rounds.close()

    # ---------------------------------------------------------------------------------------------- rounds

    def _exchange(self, fragment: FragmentState) -> None:
        x, step = self._own(fragment), self.iterations
        context, state = fragment.begun(step, self._seed), fragment.state
        seen = float(self._own_steps) if self._saw is None else self._saw

        buffers, layout = self._weights.read_buffers(), self._weights.buffers
        averaged = fragment.first and self._periodic.buffers == "average" and buffers.numel() > 0

        def begun(line: MemberLine, held: Round) -> list[Aggregation]:
            share = held.share(self._rounds.mesh.me)
            about = replace(context, rank=line.rank, size=line.size, share=share)
            learnt = replace(fragment, state=state).aggregation(x, about)
            return [learnt, self._plain(buffers, layout, line)] if averaged else [learnt]

        weight = seen - self._used.get(fragment.name, 0.0)
        wait = self._held(f"fragment {fragment.name} after step {step}", weight, begun)

        def result() -> AggregateResult:
            agreed, *rest = wait()
            self._used[fragment.name] = seen
            self._buffers = rest[0].estimate if rest else buffers
            return agreed

        fragment.in_flight = InFlight(step + fragment.averaging.overlap, result)
        self._apply(fragment)

    def _mean(self, x: Tensor, layout: Layout) -> Tensor:
        """The mean over those who come."""
        if not x.numel():
            return x

        def begun(line: MemberLine, held: Round) -> list[Aggregation]:
            return [self._plain(x, layout, line)]

        (mean,) = self._held(f"a mean after step {self.iterations}", 1.0, begun, is_open=False)()
        self._warn_of_loss()
        return mean.estimate

    def _plain(self, x: Tensor, layout: Layout, line: MemberLine) -> Aggregation:
        """An exact mean over the members of a round."""
        key = Key.of(self._seed, self.iterations)
        return Aggregation(EXACT, x, {}, StepContext(line.rank, line.size, layout, self.iterations, key))

    def _agreed_buffers(self) -> Tensor:
        """Those of the round that has just ended."""
        return self._buffers

    def _held(
        self,
        what: str,
        weight: float,
        begun: Callable[[MemberLine, Round], list[Aggregation]],
        is_open: bool = True,
    ) -> Callable[[], list[AggregateResult]]:
        """Hold a round beside the computing; the function waits for its results."""
        session, step = self._session, self.iterations

        @torch.no_grad()
        def exchange(line: MemberLine, held: Round) -> tuple[list[Aggregation], Timeline]:
            drive, aggregations = Drive(session.channel_over(line)), begun(line, held)
            for aggregation in aggregations:
                drive.add(aggregation)
            drive.end()
            return aggregations, drive.timeline

        future = self._thread.submit(self._rounds.carry, what, weight, exchange, is_open)

        @cache
        def results() -> list[AggregateResult]:
            aggregations, timeline = future.result()
            for aggregation in aggregations:
                self._check(aggregation.finite, timeline, step)
            return [aggregation.finished() for aggregation in aggregations]

        return results

    def _warn_of_loss(self) -> None:
        """Say once, of each worker that is lost, that training goes on without it; and of one that comes."""
        there = set(self._rounds.expected)
        for worker in sorted(there - self._known):
            warnings.warn(f"worker {worker} has come; training goes on with it", stacklevel=2)
        for worker in sorted(self._known - there):
            reason = self._rounds.lost.get(worker, "is away")
            warnings.warn(f"worker {worker} {reason}; training goes on without it", stacklevel=2)
        self._known = there

    # ------------------------------------------------------------------------------- one who was away

    def _answer(self, least: int) -> bytes:
        """What whoever knocks is handed: the last round's, and the step that this worker is in."""
        latest, step = self._latest, self.iterations
        if latest.number < least:
            return b""
        while any(step - last >= whole(self._periodic.period, step) for last, _ in latest.tracks.values()):
            step -= 1  # before the next exchange, so that it comes to it when the others do
        return handed_over(replace(latest, iterations=step), self._lateness.download)

    def _handover(self, number: int) -> Handover:
        tracks = {fragment.name: (fragment.last, fragment.exchanges) for fragment in self._fragments}
        common = {fragment.name: self._periodic.common(fragment.state) for fragment in self._fragments}
        buffers = FlatBuffer(self._weights.read_buffers(), self._weights.buffers)
        return Handover(number, self.iterations, tracks, {"tracks": common, "buffers": buffers})

    def _downloaded(self, least: int) -> Handover:
        """What a worker of the last round hands over, of round ``least`` or a later one."""
        return self._rounds.downloaded(least, lambda wire: read_handover(wire, self._latest))

    def _catch_up(self, error: Missed) -> None:
        """Go on from where the others are, after a round was closed without this worker."""
        for fragment in self._fragments:
            if fragment.in_flight is None:
                continue
            try:
                self._apply(fragment, early=True)
            except Missed:
                fragment.in_flight = None
                fragment.exchanges -= 1
        handover = self._downloaded(self._rounds.number + 1)
        dropped = self._take_over(handover)
        fate = "is dropped" if dropped else "goes into the next round"
        warnings.warn(f"{error}; what it learnt {fate}", stacklevel=3)

    def _take_over(self, handover: Handover) -> bool:
        """Anchors, outer state, buffers and counts of others; whether what was learnt here is dropped."""
        weights, drops = self._weights, False
        for fragment in self._fragments:
            last, exchanges = handover.tracks[fragment.name]
            missed = exchanges - fragment.exchanges
            old, own = fragment.state["anchor"].data, weights.read(fragment.layout)
            fragment.state = self._periodic.joined(handover.common["tracks"][fragment.name], fragment.state)
            anchor = fragment.state["anchor"].data
            if missed:
                late = missed <= LATE_ROUNDS
                weights.write(fragment.layout, anchor + (own - old) if late else anchor)
                drops |= not late
            if missed > LATE_ROUNDS:
                self._used[fragment.name] = float(self._own_steps) if self._saw is None else self._saw
            fragment.last, fragment.exchanges = last, exchanges
        weights.write_buffers(handover.common["buffers"].data)
        self.iterations = handover.iterations
        self._latest = handover
        self._rounds.come_to(handover.number + 1)
        return drops
