"""A thousand workers in one process: real numerics in lock-step, on a virtual clock.

Every worker has its own data, model and residuals, and holds the very same exchanges as on a cluster.
What all workers would compute alike is computed once; what each computes for itself is computed for all at
once, where ``torch.func`` can. A step: every worker's gradient, then one of

* a gradient method: all agree on the mean of the whole gradient (one bucket), then step;
* an averaging: each steps alone, then models are exchanged where they are due;
* codistillation: each steps alone, agreeing with what it heard, then predictions are exchanged;
* sharded workers (``Setting.sharded``): weights are gathered, gradients reduced to the owners of their rows,
  who step; all workers' models are the one that they hold together.

Nothing overlaps: the clock adds up computing and exchanges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop

from distcomp.advice.codistilled import Codistilled
from distcomp.advice.scenario import Scenario
from distcomp.advice.sharded_workers import ShardedWorkers
from distcomp.advice.task import TrainingTask
from distcomp.advice.virtual_clock import VirtualClock
from distcomp.attaching.slices import slices_of
from distcomp.averaging.base import Averaging, MultiLevel
from distcomp.averaging.codistill import Codistillation
from distcomp.averaging.gossip import Gossip
from distcomp.averaging.workers import Workers
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods import Method
from distcomp.methods.base import StepContext
from distcomp.methods.weight_gather import WeightGather
from distcomp.network.fabric import Fabric
from distcomp.network.model import ALONE, Host
from distcomp.randomness import Key
from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.driver import in_lock_step
from distcomp.runtime.lockstep import Lockstep

ELEMENTWISE = (SGD, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop)
AT_ONCE = 128
"""Workers whose gradients are computed by one call."""


@dataclass(frozen=True)
class Setting:
    """Who trains, where, and what goes wrong."""

    fabric: Fabric
    scenario: Scenario = field(default_factory=Scenario)
    host: Host = ALONE
    seed: int = 0
    sharded: bool = False
    """Whether all workers hold one model together, as with FSDP2."""
    weights: WeightGather | None = None
    """How they gather its weights; None: as they are."""


class Simulation:
    """``setting.fabric.ranks`` workers that train ``training_task`` by ``method``.

    Raises DistcompError for a model with buffers that training changes, for an optimizer that does not
    treat every element alone, and for a scenario in which workers die
    (:class:`~distcomp.advice.rounds.RoundsSimulation`).
    """

    def __init__(
        self, training_task: TrainingTask, method: Method | Averaging | MultiLevel, setting: Setting
    ) -> None:
        size = setting.fabric.ranks
        setting.scenario.check(size)
        if setting.scenario.failures_per_hour:
            raise DistcompError(
                "workers die in this scenario, which only outer rounds survive; give an averaging such as "
                "diloco:on_failure=continue, or leave [failures] out"
            )
        self.training_task, self.method, self.size = training_task, method, size
        self.clock = VirtualClock(setting.fabric, setting.scenario, setting.host)
        self.steps = 0
        self.layout = trained_layout(training_task.model)
        named = dict(training_task.model.named_parameters())
        x = torch.cat([named[name].detach().reshape(-1) for name in self.layout.names]).float()
        self._workers: Workers | None = None
        self._codistilled: Codistilled | None = None
        self._sharded: ShardedWorkers | None = None
        self._states: list[Any] = []
        if setting.sharded:
            self._sharded = ShardedWorkers(method, setting.weights, self.layout, size, setting.seed)
            self.net, self.models = self._sharded.net, x.repeat(size, 1)
        elif isinstance(method, Method):
            self.net, self.models = Lockstep(size), x.repeat(size, 1)
            self._states = [method.init(self.layout)] * size
        elif isinstance(method, Codistillation):
            self._codistilled = Codistilled(method, training_task, size, setting.seed)
            self.net, self.models = self._codistilled.net, x.repeat(size, 1)
        else:
            self._workers = Workers(method, x, size, self.layout, setting.seed)
            self.net, self.models = self._workers.net, self._workers.stacked
        self.net.listen = self.clock.exchange
        self._seed = setting.seed
        self._parameters = {name: nn.Parameter(piece) for name, piece in self._views(self.models).items()}
        self._optimizer = _elementwise(training_task.optimizer(self._parameters.values()))
        self._schedule = (
            training_task.schedule(self._optimizer) if training_task.schedule is not None else None
        )
        self._batch_rows = 1
        self.batched = True
        """Whether gradients of many workers are computed by one call."""

    def step(self) -> None:
        """One iteration of every worker."""
        self.clock.compute(self.steps)
        if self._sharded is not None:
            computed = self._sharded.gather(self.models[0], self.steps).repeat(self.size, 1)
            reduced = self._sharded.reduce(self._gradients(computed), self.steps)
            grads = reduced.repeat(self.size, 1)
        elif isinstance(self.method, Method):
            grads = self._agreed(self.method, self._gradients(self.models))
        else:
            grads = self._gradients(self.models)
        if self._codistilled is not None:
            grads = self._with_agreement(self._codistilled, grads)
        for name, piece in self._views(grads).items():
            self._parameters[name].grad = piece
        self._optimizer.step()
        if self._schedule is not None:
            self._schedule.step()
        self.steps += 1
        if self._workers is not None:
            self._workers.absent = self._absent()
            self._workers.step()
        if self._codistilled is not None:
            self._exchange_predictions(self._codistilled)

    def _exchange_predictions(self, codistilled: Codistilled) -> None:
        if not codistilled.due(self.steps):
            return
        # A forward without its backward: a third of what a step computes for as many rows.
        self.clock.compute(self.steps - 1, codistilled.rows / self._batch_rows / 3)
        lost = self._absent()
        codistilled.exchange(self._views(self.models), self.steps, lambda rank: lost.get(rank, frozenset()))

    def _with_agreement(self, codistilled: Codistilled, grads: Tensor) -> Tensor:
        """The gradients, with those of the term that agrees with what was heard."""
        added = codistilled.gradients(self._views(self.models), self.steps)
        if added is None:
            return grads
        self.clock.compute(self.steps, codistilled.term_rows / self._batch_rows)
        return grads + self._joined(added)

    def evaluate(self) -> dict[str, float]:
        """The averaged model's metrics, the workers' spread, virtual seconds and bytes sent per worker.

        Of codistilled networks, which have no average, the mean of their metrics.
        """
        mean = self.models.mean(0)
        evaluated = self._evaluated(mean) if self._codistilled is None else self._mean_evaluated()
        spread = float((self.models - mean).square().mean()) ** 0.5
        return {**evaluated, "spread": spread, "seconds": self.seconds, "sent_bytes": self.sent_bytes}

    def _evaluated(self, flat: Tensor) -> dict[str, float]:
        return evaluated(self.training_task, self.layout, flat)

    def _mean_evaluated(self) -> dict[str, float]:
        """The mean of every worker's metrics."""
        each = [self._evaluated(flat) for flat in self.models]
        return {name: float(np.mean([metrics[name] for metrics in each])) for name in each[0]}

    @property
    def seconds(self) -> float:
        """Virtual time: of the slowest worker."""
        return float(self.clock.now_s.max())

    @property
    def sent_bytes(self) -> float:
        """Per worker, on average, so far."""
        return float(np.mean([ledger.total_bytes for ledger in self.net.ledgers]))

    # ------------------------------------------------------------------------------------------- gradients

    def _gradients(self, models: Tensor) -> Tensor:
        """Each worker's gradient at its own of ``models``, on its own batch: ``[size, numel]``."""
        batches = [self.training_task.batch(worker, self.size, self.steps) for worker in range(self.size)]
        inputs, targets = (torch.stack(parts) for parts in zip(*batches, strict=True))
        self._batch_rows = inputs.shape[1]
        at = {name: piece.detach() for name, piece in self._views(models).items()}
        if self.batched:
            try:
                return self._joined(self._together(at, inputs, targets))
            except RuntimeError:  # what the model does has no batching rule
                self.batched = False
        each = [
            self._one({name: piece[i] for name, piece in at.items()}, inputs[i], targets[i])
            for i in range(self.size)
        ]
        return self._joined(
            {name: torch.stack([gradients[name] for gradients in each]) for name in self.layout.names}
        )

    @property
    def _one(self) -> Callable[[Mapping[str, Tensor], Tensor, Tensor], dict[str, Tensor]]:
        return grad(partial(loss_at, self.training_task))

    def _together(self, models: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        each = vmap(self._one, randomness="different", chunk_size=min(AT_ONCE, self.size))
        return each(models, inputs, targets)

    def _joined(self, grads: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([grads[name].reshape(self.size, -1) for name in self.layout.names], dim=1)

    def _views(self, stacked: Tensor) -> dict[str, Tensor]:
        """``[size, *shape]`` of each parameter."""
        return {
            param.name: stacked[:, at : at + param.numel].view(self.size, *param.shape)
            for param, at in zip(self.layout.slices, self.layout.offsets, strict=True)
        }

    # ------------------------------------------------------------------------------------------- exchanges

    @torch.no_grad()
    def _agreed(self, method: Method, grads: Tensor) -> Tensor:
        """Each worker's estimate of the mean gradient; states are kept if all was finite."""
        key = Key.of(self._seed, self.steps)
        profiles = [
            Aggregation(method, x, state, StepContext(rank, self.size, self.layout, self.steps, key))
            for rank, (x, state) in enumerate(zip(grads.unbind(), self._states, strict=True))
        ]
        results = in_lock_step(self.net, profiles)
        if not all(profile.finite for profile in profiles):
            raise DistcompError(
                f"a gradient held a NaN or an infinity in step {self.steps}: training diverged; lower the "
                "learning rate"
            )
        self._states = [result.state for result in results]
        for row, result in zip(grads.unbind(), results, strict=True):
            row.copy_(result.estimate)
        return grads

    def _absent(self) -> dict[int, frozenset[int]]:
        """Whom each worker cannot reach, where the averaging goes on without them."""
        averaging = self.method
        if not isinstance(averaging, Gossip) or averaging.on_failure != "continue" or averaging.replicas:
            return {}
        unheard, everyone = self.clock.unheard(), frozenset(range(self.size))
        return (
            {rank: everyone if rank in unheard else unheard for rank in range(self.size)} if unheard else {}
        )


def evaluated(training_task: TrainingTask, layout: Layout, flat: Tensor) -> dict[str, float]:
    """The metrics of one model."""
    if training_task.evaluate is None:
        return {}
    model = deepcopy(training_task.model)
    with torch.no_grad():
        for (_, piece), name in zip(layout.pieces(flat), layout.names, strict=True):
            parameter = model.get_parameter(name)
            parameter.copy_(piece.view_as(parameter))
    return dict(training_task.evaluate(model))


def loss_at(
    training_task: TrainingTask, parameters: Mapping[str, Tensor], inputs: Tensor, targets: Tensor
) -> Tensor:
    """The loss of a batch at ``parameters``."""
    outputs: Tensor = functional_call(training_task.model, dict(parameters), (inputs,))
    return training_task.loss(outputs, targets)


def trained_layout(model: nn.Module) -> Layout:
    """Of the parameters that are trained. Raises DistcompError for a model with buffers."""
    if list(model.buffers()):
        raise DistcompError(
            "the model has buffers, and many workers in one process share the module; "
            "use GroupNorm or LayerNorm for BatchNorm"
        )
    slices = slices_of(model)
    return Layout(tuple(slices[id(parameter)] for parameter in model.parameters() if parameter.requires_grad))


def _elementwise(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    if not isinstance(optimizer, ELEMENTWISE):
        raise DistcompError(
            f"{type(optimizer).__name__} may look at a whole parameter, and those of all workers lie in "
            f"one tensor; use one of {', '.join(kind.__name__ for kind in ELEMENTWISE)}"
        )
    return optimizer
