"""Outer rounds of a thousand workers that are late, die and join, in one process, in virtual time.

The numerics are real, and nobody sleeps. What :mod:`distcomp.transports.rounds` and
:mod:`distcomp.attaching.rounds` do among processes is played event by event: workers come to a round when
their steps are done, the round closes by quorum and grace window, whoever comes later takes the anchor over
and carries what it learnt, or drops it.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.optim import SGD

from distcomp.advice.scenario import Scenario
from distcomp.advice.simulate import AT_ONCE, evaluated, loss_at, trained_layout
from distcomp.advice.task import TrainingTask
from distcomp.advice.virtual_clock import VirtualClock
from distcomp.averaging.base import AveragingContext, fragment_states
from distcomp.averaging.lateness import LATE_ROUNDS
from distcomp.averaging.periodic import Periodic
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods.base import State
from distcomp.network.fabric import Fabric
from distcomp.randomness import Key
from distcomp.runtime.channel import TRUE, Answer
from distcomp.runtime.driver import in_lock_step
from distcomp.runtime.lockstep import Lockstep

COMES, DIES, RETURNS = "comes", "dies", "returns"


@dataclass(frozen=True)
class Stint:
    """What a worker computes from one anchor to its next contribution."""

    base: int
    """The round after which it began."""
    model: Tensor
    first: int
    """The first of its steps, counted over the run."""
    steps: int
    begin_s: float
    ready_s: float
    seen: float
    """Steps that its contribution stands for: these, and what it carries."""
    useful_s: float
    """Seconds of computing behind it."""
    carries: Stint | None = None
    """One that came too late, and is in the contribution."""


@dataclass
class Account:
    """Worker-seconds, and what became of them. ``goodput = applied_s / (workers x virtual time)``: seconds of
    computing whose steps are in a contribution that was applied, in its round or carried into the next one.
    Waiting, exchanging, being dead, and steps that were dropped or died with their worker are not."""

    applied_s: float = 0.0
    contributions: int = 0
    carried: int = 0
    dropped: int = 0
    died: int = 0
    joined: int = 0
    members: list[int] = field(default_factory=list)


class RoundsSimulation:
    """``fabric.ranks`` workers that train ``task`` by ``periodic``, of which some are late, die and join.

    The inner optimizer is SGD, with momentum or without; a newcomer begins with none. What compressing, and
    handing over to a newcomer, take is not on the clock. Without ``trains`` the clock and the account alone
    run, which depend on no number: hours of a thousand workers in seconds.

    Raises DistcompError for an averaging that stops when a worker dies, one of several fragments or an
    overlap, another optimizer, racks, and a scenario whose links fail.
    """

    def __init__(
        self,
        task: TrainingTask,
        periodic: Periodic,
        fabric: Fabric,
        scenario: Scenario,
        seed: int = 0,
        trains: bool = True,
    ) -> None:
        if periodic.lateness is None or periodic.fragments > 1 or periodic.overlap or fabric.racks:
            raise DistcompError(
                "rounds are simulated of on_failure='continue', one fragment, no overlap and no racks; give "
                "such a method and network, or leave on_failure and [failures] out: nobody is late then"
            )
        if scenario.down:
            raise DistcompError(
                "links do not fail where rounds are simulated, workers do; give [failures] for [[down]], or "
                "leave on_failure out"
            )
        scenario.check(fabric.ranks)
        self.task, self.periodic, self.lateness = task, periodic, periodic.lateness
        self.size, self.layout = fabric.ranks, trained_layout(task.model)
        self.account = Account()
        self.now_s = 0.0
        self.rounds = 0
        self.sent_bytes = 0.0
        """Per worker, on average, so far; counted where they train."""
        self._trains = trains
        self._priced = cache(self._price)
        self._period = _fixed(periodic.period)
        self._fabric, self._scenario, self._seed = fabric, scenario, seed
        self._inner = _Inner(task, self.layout, self.size)
        named = dict(task.model.named_parameters())
        x = torch.cat([named[name].detach().reshape(-1) for name in self.layout.names]).float()
        (self._fragment,) = fragment_states(periodic, self.layout, 0, self.size)
        fresh = periodic.init(x, AveragingContext(0, self.size, self.layout, 0, Key.of(seed)))
        self._common = periodic.common(fresh)
        self._own: list[State] = [fresh] * self.size
        self._draw = np.random.default_rng((scenario.seed, 1))
        self._times = cache(partial(scenario.computing_s, workers=self.size))
        self._stints = {worker: self._begun(worker, 0.0, self._period) for worker in range(self.size)}
        self._dies_s = {worker: self._lifetime_s() for worker in range(self.size)}
        self._returns_s: dict[int, float] = {}
        self._expected = set(range(self.size))

    @property
    def anchor(self) -> Tensor:
        """The model that all have agreed on."""
        anchor: Tensor = self._common["anchor"].data
        return anchor

    @property
    def goodput(self) -> float:
        """The share of all worker-seconds so far that ended in an applied contribution."""
        return self.account.applied_s / (self.size * self.now_s)

    @property
    def steps(self) -> int:
        """Iterations of who was never late, so far."""
        return self.rounds * self._period

    def evaluate(self) -> dict[str, float]:
        """The metrics of the anchor."""
        return evaluated(self.task, self.layout, self.anchor)

    def told(self) -> dict[str, float]:
        """Virtual seconds, bytes sent per worker, goodput, and what became of the workers so far."""
        account = self.account
        return {
            "seconds": self.now_s, "sent_bytes": self.sent_bytes, "goodput": self.goodput,
            "members": account.members[-1] if account.members else 0, "carried": account.carried,
            "dropped": account.dropped, "died": account.died, "joined": account.joined,
        }  # fmt: skip

    def round(self) -> None:
        """Hold the next outer round, and let who took part begin anew."""
        closed_s, members = self._called()
        if self._trains:
            models = self._models({worker: self._stints[worker] for worker in members})
            exchanged_s = self._exchange(members, models)
        else:
            exchanged_s = self._priced(len(members))
        account = self.account
        account.members.append(len(members))
        account.contributions += len(members)
        account.applied_s += sum(self._stints[worker].useful_s for worker in members)
        self.rounds += 1
        self.now_s = closed_s + exchanged_s
        self._expected = set(members)
        for worker in members:
            self._stints[worker] = self._begun(worker, self.now_s, self._period)

    # ---------------------------------------------------------------------------------------- who comes when

    def _called(self) -> tuple[float, list[int]]:
        """When the round closes, and who has come by then."""
        events = [(stint.ready_s, COMES, worker) for worker, stint in self._stints.items()]
        events += [(dies_s, DIES, worker) for worker, dies_s in self._dies_s.items()]
        events += [(back_s, RETURNS, worker) for worker, back_s in self._returns_s.items()]
        heapq.heapify(events)
        came: dict[int, float] = {}
        quorum_s = float("inf")
        while events:
            at_s, what, worker = heapq.heappop(events)
            if at_s > quorum_s + self.lateness.grace_s:
                return quorum_s + self.lateness.grace_s, sorted(came)
            if at_s == float("inf"):
                break
            stint = self._stints.get(worker)
            if what == DIES:
                came.pop(worker, None)
                heapq.heappush(events, (self._die(worker, at_s), RETURNS, worker))
            elif what == RETURNS:
                heapq.heappush(events, (self._join(worker, at_s), COMES, worker))
            elif stint is None or stint.ready_s != at_s:
                continue  # it died before
            elif stint.base == self.rounds:
                came[worker] = at_s
            else:
                heapq.heappush(events, (self._catch_up(worker, at_s), COMES, worker))
            if len(came) < self.lateness.quorum:
                quorum_s = float("inf")
                continue
            quorum_s = min(quorum_s, at_s)
            if self._expected <= set(came):
                return at_s, sorted(came)
        raise DistcompError(
            f"{len(came)} of at least {self.lateness.quorum} workers (the quorum) come to outer round "
            f"{self.rounds + 1}; simulate fewer failures, or a smaller quorum"
        )

    def _die(self, worker: int, at_s: float) -> float:
        """When another takes its place."""
        del self._stints[worker], self._dies_s[worker]
        self._expected.discard(worker)
        self.account.died += 1
        self._returns_s[worker] = at_s + self._scenario.replaced_s
        return self._returns_s[worker]

    def _join(self, worker: int, at_s: float) -> float:
        """When a newcomer is ready, which begins from the anchor with nothing of its own."""
        del self._returns_s[worker]
        self.account.joined += 1
        self._own[worker] = self._fresh()
        self._inner.forget(worker)
        self._dies_s[worker] = at_s + self._lifetime_s()
        self._stints[worker] = self._begun(worker, at_s, self._left(at_s))
        self._expected.add(worker)
        return self._stints[worker].ready_s

    def _catch_up(self, worker: int, at_s: float) -> float:
        """When one that came late is ready again; what it learnt is carried, or dropped."""
        late = self._stints[worker]
        stint = self._begun(worker, at_s, self._left(at_s))
        if self.rounds - late.base <= LATE_ROUNDS:
            stint = replace(
                stint,
                seen=stint.seen + late.seen,
                useful_s=stint.useful_s + late.useful_s,
                carries=late,
            )
            self.account.carried += 1
        else:
            self.account.dropped += 1
        self._stints[worker] = stint
        self._expected.add(worker)
        return stint.ready_s

    def _left(self, at_s: float) -> int:
        """How many steps are left in the round to the worker that hands over: whoever comes then does as
        many, one at least."""
        there = [
            stint for worker, stint in self._stints.items()
            if stint.base == self.rounds and worker in self._expected
        ]  # fmt: skip
        if not there:
            return self._period
        host = there[0]
        share = (at_s - host.begin_s) / (host.ready_s - host.begin_s) if host.ready_s > host.begin_s else 1.0
        return max(1, host.steps - int(host.steps * min(1.0, share)))

    def _begun(self, worker: int, at_s: float, steps: int) -> Stint:
        """A stint from the anchor as it is now; it is there when the last round is over."""
        at_s = max(at_s, self.now_s)
        first = (self.rounds + 1) * self._period - steps
        computing_s = float(sum(self._times(first + step)[worker] for step in range(steps)))
        return Stint(
            self.rounds, self.anchor, first, steps, at_s, at_s + computing_s, float(steps), computing_s
        )

    def _lifetime_s(self) -> float:
        """Until a worker dies: memoryless."""
        per_s = -np.log1p(-self._scenario.failures_per_hour) / 3600
        return float(self._draw.exponential(1 / per_s)) if per_s else float("inf")

    # ------------------------------------------------------------------------------------------- the exchange

    def _models(self, stints: Mapping[int, Stint]) -> dict[int, Tensor]:
        """What workers bring: where a stint carries another, it begins with what was learnt in that one."""
        late = {worker: stint.carries for worker, stint in stints.items() if stint.carries is not None}
        trained = self._models(late) if late else {}
        learnt = {worker: model - late[worker].model for worker, model in trained.items()}
        return self._inner.trained(
            {
                worker: replace(stint, model=stint.model + learnt[worker]) if worker in learnt else stint
                for worker, stint in stints.items()
            }
        )

    def _price(self, members: int) -> float:
        """The virtual seconds of an exchange among the first so many, whatever they bring."""
        context = AveragingContext(0, members, self.layout, self.rounds, Key.of(self._seed))
        state = self.periodic.joined(self._common, self._own[0])
        aggregation = replace(self._fragment, state=state).aggregation(self.anchor, context)
        clock = VirtualClock(replace(self._fabric, rates_bps=self._fabric.rates_bps[:members]), Scenario())
        request = aggregation.ask(None)
        while request is not None:
            clock.exchange([request] * members)
            request = aggregation.ask(Answer(request.made_up(0, members), TRUE))
        return float(clock.now_s.max())

    def _fresh(self) -> State:
        context = AveragingContext(0, self.size, self.layout, 0, Key.of(self._seed))
        return self.periodic.init(self.anchor, context)

    def _exchange(self, members: list[int], models: Mapping[int, Tensor]) -> float:
        """Agree on the next anchor; the virtual seconds that it takes."""
        seen = [self._stints[worker].seen for worker in members]
        key = Key.of(self._seed, self.rounds)
        aggregations = []
        for place, worker in enumerate(members):
            share = len(members) * seen[place] / sum(seen)
            context = AveragingContext(place, len(members), self.layout, self.rounds, key, share=share)
            state = self.periodic.joined(self._common, self._own[worker])
            aggregations.append(replace(self._fragment, state=state).aggregation(models[worker], context))
        net, fabric = Lockstep(len(members)), replace(
            self._fabric, rates_bps=tuple(self._fabric.rates_bps[worker] for worker in members)
        )  # fmt: skip
        clock = VirtualClock(fabric, Scenario())
        net.listen = clock.exchange
        with torch.no_grad():
            results = in_lock_step(net, aggregations)
        self.sent_bytes += sum(ledger.total_bytes for ledger in net.ledgers) / self.size
        self._common = self.periodic.common(results[0].state)
        for worker, result in zip(members, results, strict=True):
            self._own[worker] = result.state
        if not torch.isfinite(self.anchor).all():
            raise DistcompError(f"training diverged in round {self.rounds + 1}; lower the learning rate")
        return float(clock.now_s.max())


class _Inner:
    """SGD of many workers at once, each with momentum of its own."""

    def __init__(self, task: TrainingTask, layout: Layout, size: int) -> None:
        parameter = nn.Parameter(torch.zeros(1, dtype=torch.float32))
        optimizer = task.optimizer([parameter])
        if not isinstance(optimizer, SGD) or optimizer.param_groups[0]["dampening"]:
            raise DistcompError(
                f"rounds are simulated with torch.optim.SGD inside, without dampening, not {optimizer}"
            )
        self._group = optimizer.param_groups[0]
        self._schedule = task.schedule(optimizer) if task.schedule is not None else None
        self._rates: list[float] = []
        self._optimizer = optimizer
        self._task, self._layout, self._size = task, layout, size
        self._momentum = torch.zeros(size, layout.numel, dtype=torch.float32)
        self._gradient = vmap(grad(partial(loss_at, task)), randomness="different", chunk_size=AT_ONCE)

    def forget(self, worker: int) -> None:
        """Another worker takes this one's place."""
        self._momentum[worker] = 0.0

    def trained(self, stints: Mapping[int, Stint]) -> dict[int, Tensor]:
        """The models after the stints. Each worker's last steps are taken together with the others' last."""
        # Sorted by length: in each step those who take part are the first rows.
        workers = sorted(stints, key=lambda worker: -stints[worker].steps)
        models = torch.stack([stints[worker].model for worker in workers])
        momentum = self._momentum[workers]
        steps = [stints[worker].steps for worker in workers]
        for left in range(steps[0], 0, -1):
            active = sum(count >= left for count in steps)
            now = {worker: stints[worker].first + stints[worker].steps - left for worker in workers[:active]}
            self._step(models[:active], momentum[:active], now)
        self._momentum[workers] = momentum
        return dict(zip(workers, models.unbind(), strict=True))

    def _rates_of(self, now: Mapping[int, int]) -> Tensor:
        """Each worker's learning rate, a row."""
        return torch.tensor([self._rate(step) for step in now.values()], dtype=torch.float32)[:, None]

    @torch.no_grad()
    def _step(self, models: Tensor, momentum: Tensor, now: Mapping[int, int]) -> None:
        """One step of each, in place."""
        group, rates = self._group, self._rates_of(now)
        gradient = self._gradients(models, now) + group["weight_decay"] * models
        momentum.mul_(group["momentum"]).add_(gradient)
        direction = gradient + group["momentum"] * momentum if group["nesterov"] else momentum
        models.sub_(rates * direction)

    def _gradients(self, models: Tensor, now: Mapping[int, int]) -> Tensor:
        batches = [self._task.batch(worker, self._size, step) for worker, step in now.items()]
        inputs, targets = (torch.stack(parts) for parts in zip(*batches, strict=True))
        at = {
            param.name: models[:, start : start + param.numel].reshape(len(models), *param.shape)
            for param, start in zip(self._layout.slices, self._layout.offsets, strict=True)
        }
        found: dict[str, Tensor] = self._gradient(at, inputs, targets)
        return torch.cat([found[name].reshape(len(models), -1) for name in self._layout.names], dim=1)

    def _rate(self, step: int) -> float:
        """The learning rate in a step."""
        while len(self._rates) <= step:
            self._rates.append(self._group["lr"])
            if self._schedule is not None:
                self._optimizer.step()
                self._schedule.step()
        return self._rates[step]


def _fixed(period: Any) -> int:
    if not isinstance(period, int):
        raise DistcompError(f"rounds are simulated of one period, not {period}; give a number of steps")
    return period
