"""Many workers trained in lock-step in one process, by any method: what the studies of convergence share.

The workers' models are the rows of one tensor, and their gradients come from one batched backward. What they
say to each other is what real ranks would say: bytes are counted where those are.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks._places import example
from distcomp.attaching.weights import Weights
from distcomp.averaging.base import Averaging, MultiLevel
from distcomp.averaging.workers import Workers
from distcomp.layout import Layout
from distcomp.methods import Method
from distcomp.methods.base import State, StepContext
from distcomp.randomness import Key
from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.ledger import Ledger
from distcomp.runtime.lockstep import Lockstep

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """What is learnt: a network, its loss (a mean), every worker's batches, and a test set."""

    network: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    batches: Callable[[int, int], Iterator[Batch]]
    """``(workers, seed)`` -> inputs and targets, each with a row per worker"""
    test: Batch
    stacked: Callable[[Tensor, Layout, Tensor], Tensor] | None = None
    """``(models, layout, inputs)``, a row per worker in each -> scores; None: the network, mapped over
    rows"""


@dataclass(frozen=True)
class Plan:
    """How it is learnt. ``rate`` scales the optimizer's learning rate by the step.

    ``watch_every`` steps the test loss is taken; where it is at most ``target``, training ends.
    """

    workers: int
    steps: int
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]
    rate: Callable[[int], float] = lambda _: 1.0
    seed: int = 0
    watch_every: int = 0
    target: float = -math.inf


class Gradients:
    """Every worker's gradient replaced by the estimate of their mean, as DistributedDataParallel would."""

    def __init__(self, method: Method, workers: int, layout: Layout, seed: int) -> None:
        self.method, self.layout, self.seed = method, layout, seed
        self.net = Lockstep(workers)
        self.states: list[State] = [method.init(layout) for _ in range(workers)]
        self.steps = 0

    def exchange(self, gradients: Tensor) -> None:
        key, size = Key.of(self.seed, self.steps), len(gradients)
        all_rounds = [
            Aggregation(self.method, row, state, StepContext(rank, size, self.layout, self.steps, key))
            for rank, (row, state) in enumerate(zip(gradients.unbind(), self.states, strict=True))
        ]
        self.net.run(all_rounds)
        self.steps += 1
        for rank, rounds in enumerate(all_rounds):
            assert rounds.result is not None
            self.states[rank] = rounds.result.state
            gradients[rank].copy_(rounds.result.estimate)


class Oversubscription:
    """A task's workers, all alike at first, and what carries their gradients or models.

    ``after``: workers that agree, whose models, optimizer and steps are gone on from.
    """

    def __init__(
        self,
        task: Task,
        plan: Plan,
        carrier: Averaging | MultiLevel | Method,
        after: Oversubscription | None = None,
    ) -> None:
        torch.manual_seed(plan.seed)
        self.task, self.plan, self.steps = task, plan, after.steps if after else 0
        self.net = task.network()
        weights = Weights(self.net)
        self.layout = weights.layout
        start = after.models.detach()[0] if after else weights.read(self.layout)
        self.models = start.repeat(plan.workers, 1).requires_grad_()
        self.optimizer = plan.optimizer([self.models])
        if after:
            self.optimizer.state[self.models] = deepcopy(after.optimizer.state[after.models])
        # The schedule is told the steps of the whole run; LambdaLR counts from here.
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: plan.rate(self.steps))
        self.batches = islice(task.batches(plan.workers, plan.seed), self.steps, None)
        self.gradients = self.workers = None
        if isinstance(carrier, Method):
            self.gradients = Gradients(carrier, plan.workers, self.layout, plan.seed)
        else:
            self.workers = Workers(carrier, start, plan.workers, self.layout, plan.seed)
            self.workers.models = list(self.models.detach().unbind())

    def step(self) -> bool:
        """One iteration of all workers; False where a gradient is not finite any more."""
        inputs, targets = next(self.batches)
        self.steps += 1
        scores = self._scores(self.models, inputs).flatten(0, 1)
        loss = self.plan.workers * self.task.loss(scores, targets.flatten(0, 1))
        (gradients,) = torch.autograd.grad(loss, self.models)
        if not math.isfinite(gradients.sum()):
            return False
        if self.gradients is not None:
            self.gradients.exchange(gradients)
        self.models.grad = gradients
        self.optimizer.step()
        self.schedule.step()
        if self.workers is not None:
            kept = self.optimizer.state[self.models]
            self.workers.moments = {
                name: value for name, value in kept.items() if getattr(value, "shape", 0) == self.models.shape
            }
            self.workers.step()
        return True

    def _scores(self, models: Tensor, inputs: Tensor) -> Tensor:
        """Of every worker's model (a row of ``models``) for its own inputs."""
        if self.task.stacked:
            return self.task.stacked(models, self.layout, inputs)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel knows no vmap
            scores: Tensor = vmap(self._call)(models, inputs)
        return scores

    def _call(self, flat: Tensor, inputs: Tensor) -> Tensor:
        named = {param.name: piece.view(param.shape) for param, piece in self.layout.pieces(flat)}
        scores: Tensor = functional_call(self.net, named, (inputs,))
        return scores

    @torch.no_grad()
    def test(self, model: Tensor | None = None) -> tuple[float, float]:
        """Test loss and accuracy of the averaged model, or of another one (flat)."""
        inputs, targets = self.task.test
        scores = self._call(self.models.mean(0) if model is None else model, inputs)
        accuracy = (scores.argmax(-1) == targets).float().mean()
        return float(self.task.loss(scores, targets)), float(accuracy)

    @property
    def ledgers(self) -> list[Ledger]:
        talking = self.gradients or self.workers
        assert talking is not None
        return talking.net.ledgers

    def result(self) -> dict[str, Any]:
        """What the averaged model is worth, how far apart the workers are, and what each has sent."""
        loss, accuracy = self.test()
        apart = (self.models - self.models.mean(0)).detach()
        return {
            "test_loss": loss,
            "test_accuracy": accuracy,
            "spread": float(apart.square().mean() ** 0.5),
            "sent_bytes": sum(ledger.total_bytes for ledger in self.ledgers) / self.plan.workers,
        }


def train(task: Task, plan: Plan, carrier: Averaging | MultiLevel | Method) -> dict[str, Any]:
    """Train to the end, or to the target; a run that is not finite any more says ``{"diverged": step}``."""
    oversubscription = Oversubscription(task, plan, carrier)
    curve = {}
    for step in range(1, plan.steps + 1):
        if not oversubscription.step():
            return {"diverged": step}
        if plan.watch_every and step % plan.watch_every == 0:
            curve[step] = oversubscription.test()[0]
            if curve[step] <= plan.target:
                break
    result = oversubscription.result()
    if not math.isfinite(result["test_loss"]):
        return {"diverged": plan.steps}
    return {**result, "steps": step, **({"curve": curve} if curve else {})}


def warm_up_then_cosine(steps: int) -> Callable[[int], float]:
    """The share of the highest learning rate: up over the first tenth of the steps, then down to 0."""

    def share(step: int) -> float:
        return min(1, 10 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))

    return share


def rows(draw: Callable[[int, torch.Generator], Batch], workers: int, seed: int) -> Iterator[Batch]:
    """Batches of all workers, drawn by ``draw(worker, generator)`` from a stream of each worker's own."""
    streams = [torch.Generator().manual_seed(seed * workers + worker) for worker in range(workers)]
    while True:
        drawn = [draw(worker, stream) for worker, stream in enumerate(streams)]
        yield torch.stack([inputs for inputs, _ in drawn]), torch.stack([targets for _, targets in drawn])


def digit_pairs(batch: int = 32, width: int = 80) -> Task:
    """Two digits side by side, the last digit of their sum; every worker has images of its own."""
    shown = example("digits")
    (images, labels), held_out = shown.digits()

    def network() -> nn.Module:
        net = nn.Sequential(
            nn.Linear(128, width, bias=False), nn.GELU(),
            nn.Linear(width, width, bias=False), nn.GELU(),
            nn.Linear(width, 10, bias=False),
        )  # fmt: skip
        for layer in net[::2]:
            nn.init.kaiming_normal_(layer.weight)
        return net

    def batches(workers: int, seed: int) -> Iterator[Batch]:
        def draw(worker: int, stream: torch.Generator) -> Batch:
            return shown.pairs(images[worker::workers], labels[worker::workers], batch, stream)

        return rows(draw, workers, seed)

    test = shown.pairs(*held_out, 4000, torch.Generator().manual_seed(0))
    return Task(network, nn.functional.cross_entropy, batches, test)


def byte_language_model(batch: int, context: int) -> Task:
    """The transformer of examples/bytes_lm.py, on texts of ``context`` bytes of Python's standard library."""
    bytes_lm = example("bytes_lm")
    bytes_lm.CONTEXT = context
    library = bytes_lm.modules()
    held_out = torch.cat(library[::10])
    del library[::10]

    def batches(workers: int, seed: int) -> Iterator[Batch]:
        texts = [torch.cat(library[worker::workers]) for worker in range(workers)]

        def draw(worker: int, stream: torch.Generator) -> Batch:
            return bytes_lm.texts(texts[worker], batch, stream)

        return rows(draw, workers, seed)

    test = bytes_lm.texts(held_out, 512, torch.Generator().manual_seed(0))
    return Task(bytes_lm.Reader, bytes_lm.loss_of, batches, test)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one method over its seeds: how many ran and diverged; of the others losses, and what was sent."""
    through = [one for one in runs if "diverged" not in one]
    found: dict[str, Any] = {"seeds": len(runs), "diverged": len(runs) - len(through)}
    if through:
        losses = [one["test_loss"] for one in through]
        found |= {
            "test_loss": losses,
            "mean": statistics.mean(losses),
            "range": [min(losses), max(losses)],
            "test_accuracy": statistics.mean(one["test_accuracy"] for one in through),
            "sent_bytes": through[0]["sent_bytes"],
        }
    return found
