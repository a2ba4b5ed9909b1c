"""What serves an attached method, whichever kind it is: gradients, shards, models, or PyTorch's own hooks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from distcomp.attaching.record import Iteration
from distcomp.attaching.session import Session
from distcomp.attaching.target import Target
from distcomp.errors import DistcompError
from distcomp.methods.base import ByParameter, State, StepContext
from distcomp.runtime import driver
from distcomp.runtime.aggregation import Aggregator
from distcomp.runtime.executor import Executor
from distcomp.runtime.states import States
from distcomp.training import Listener, TrainingClock


class Sync(Listener, ABC):
    """What a handle, a watch and a pruner need of what serves the attached method.

    Those who serve override what differs from "gradients, agreed on in every backward, replicas alike".
    """

    replicated: bool = True
    """Whether weights are the same on every rank anyway."""

    def __init__(self, method: Any, session: Session, clock: TrainingClock) -> None:
        self.method = method
        self.iterations = 0
        """Iterations that are over."""
        self.last: Iteration | None = None
        """What the last one did."""
        self.states: States | None = None
        """What the method remembers, where it is kept by parameter."""
        self.detail_every = 0
        """Every how many iterations a closer look is taken; 0: never."""
        self.detail: dict[str, Any] = {}
        """What the last one found, by parameter (:mod:`distcomp.attaching.details`); empty without any."""
        self.error: BaseException | None = None
        """What went wrong, once and for all."""
        self.session = session
        self.clock = clock
        self._own_lanes: dict[torch.device, Executor] = {}

    @property
    def looks_closer(self) -> bool:
        """Whether a closer look is taken at the iteration that is under way."""
        return self.detail_every > 0 and self.iterations % self.detail_every == 0

    @property
    def text(self) -> str:
        """The method, as all ranks agreed on it."""
        return str(self.method)

    @property
    def sent_bytes(self) -> Mapping[str, int]:
        """Bytes that this rank has sent, by kind."""
        return dict(self.session.ledger.sent_bytes)

    @property
    def under_way(self) -> bool:
        """Whether an iteration has begun to exchange and is not over."""
        return False

    def idle(self) -> None:
        """Wait for exchanges that can end by themselves. Raises what went wrong, with its own type."""
        if self.error is not None:
            raise self.error

    def exchange(
        self, aggregator: Aggregator, x: Tensor, state: State, context: StepContext
    ) -> driver.Exchange:
        """Exchange a flat float32 tensor that is no iteration's, in order with all else on the line."""
        self.idle()
        with torch.no_grad():
            return driver.exchange(aggregator, x, state, context, self.executor(x.device))

    def executor(self, device: torch.device) -> Executor:
        """What carries such exchanges."""
        if device not in self._own_lanes:
            self._own_lanes[device] = Executor(self.session.channel, device, beside=False)
        return self._own_lanes[device]

    @contextmanager
    def averaged(self) -> Iterator[float]:
        """The module holds the mean of all ranks' weights; yields their distance from it. Replicas are alike:
        0."""
        yield 0.0

    def no_sync(self) -> AbstractContextManager[None]:
        """Backwards in this context are no iterations, beyond what DDP's own context does."""
        return nullcontext()

    def saw(self, samples: float) -> None:
        """Count what this worker saw, where workers are weighed by it."""
        raise DistcompError(
            f"{self.text} weighs all ranks alike; give periodic averaging on_failure='continue' to weigh "
            "them by what they saw"
        )

    def finish(self) -> None:
        """Make all ranks hold the same weights. Replicas do."""

    def report(self) -> dict[str, Any]:
        """What the method itself has to say in ``stats()``, ``state_bytes`` among it."""
        return {"state_bytes": 0 if self.states is None else self.states.held_bytes}

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What this rank remembers between iterations: tensors, numbers and text."""

    def fingerprint(self, target: Target) -> str:
        """What a checkpoint's parameters must be: equal on all ranks."""
        return target.shapes_digest

    def expected_state(self, saved: Mapping[str, Any]) -> ByParameter | None:
        """What the state of a saved part must be like (tensors without values); None where nobody can say.

        Raises DistcompError where what the part says beside its state cannot be, or means nothing here.
        """
        return None

    @abstractmethod
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from it. It was looked at, and every rank has one of the same step."""

    def close(self) -> None:
        """Leave the model: stop listening, end threads. Always returns."""
        self.clock.leave(self)
        for executor in self._own_lanes.values():
            executor.close()
