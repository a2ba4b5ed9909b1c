"""Many codistilling workers in one process: what they predict, what they heard, and the term that agrees."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from distcomp.advice.task import TrainingTask
from distcomp.averaging.base import FragmentState, fragment_states
from distcomp.averaging.codistill import Codistillation, predictions_layout
from distcomp.errors import DistcompError
from distcomp.runtime.driver import in_lock_step
from distcomp.runtime.lockstep import Lockstep

StackedParameters = Mapping[str, Tensor]
"""``[workers, *shape]`` of each parameter, or ``[*shape]`` of one worker's."""


class Codistilled:
    """``size`` workers that agree on predictions of ``training_task.shared``.

    Raises DistcompError for a task without shared examples, and for the exchange of checkpoints, which runs
    in real processes only.
    """

    def __init__(
        self, codistillation: Codistillation, training_task: TrainingTask, size: int, seed: int
    ) -> None:
        if training_task.shared is None or not codistillation.own_models:
            raise DistcompError(
                "codistill is simulated with predictions of shared examples; let training_task() return a "
                "TrainingTask with shared=examples, and leave exchanged=checkpoints to real processes"
            )
        self.codistillation = codistillation
        self.net = Lockstep(size)
        self._task, self._shared, self._seed, self._size = training_task, training_task.shared, seed, size
        self.rows = rows = codistillation.check_rows(len(self._shared))
        """Of an exchange."""
        self.term_rows = min(codistillation.batch, rows)
        """Of the term in a step."""
        with torch.no_grad():
            layout = predictions_layout(rows, training_task.model(self._shared[:1]))
        self.fragments: list[FragmentState] = []
        for rank in range(size):
            self.fragments += fragment_states(codistillation, layout, rank, size)
        for fragment in self.fragments:
            fragment.start(torch.zeros(layout.numel, dtype=torch.float32))

    def gradients(self, parameters: StackedParameters, step: int) -> dict[str, Tensor] | None:
        """Of the weighted term at every worker's model in step ``step``; None while nobody was heard."""
        weight = self.codistillation.weight_at(step)
        if not weight or not any(fragment.exchanges for fragment in self.fragments):
            return None
        inputs, targets = zip(*(self._batch(rank, step) for rank in range(self._size)), strict=True)
        each = vmap(grad(self._term), randomness="different")
        found: dict[str, Tensor] = each(dict(parameters), torch.stack(inputs), torch.stack(targets))
        heard = torch.tensor([self._heard(fragment) for fragment in self.fragments], dtype=torch.float32)
        return {
            name: weight * tensor * heard.view(-1, *[1] * (tensor.dim() - 1))
            for name, tensor in found.items()
        }

    def exchange(
        self, parameters: StackedParameters, step: int, absent: Callable[[int], frozenset[int]]
    ) -> None:
        """Exchange predictions after ``step`` iterations."""
        rows = self.codistillation.exchanged_rows(len(self._shared), step, self._seed)
        examples = self._shared[rows]
        with torch.no_grad():
            outputs = vmap(self._outputs, in_dims=(0, None), randomness="different")(
                dict(parameters), examples
            )
        aggregations = [
            fragment.aggregate(self.codistillation.prepared(own.float()), step, self._seed, absent(rank))
            for rank, (fragment, own) in enumerate(zip(self.fragments, outputs, strict=True))
        ]
        for fragment, result in zip(self.fragments, in_lock_step(self.net, aggregations), strict=True):
            fragment.state = result.state

    def due(self, step: int) -> bool:
        """Whether predictions are exchanged after ``step`` iterations."""
        return self.fragments[0].due(step)

    def _heard(self, fragment: FragmentState) -> float:
        return float(any(bool(count) for count in fragment.state["heard"].values()))

    def _batch(self, rank: int, step: int) -> tuple[Tensor, Tensor]:
        """The examples that a worker looks at in a step, and what it heard of them."""
        fragment = self.fragments[rank]
        rows = self.codistillation.exchanged_rows(len(self._shared), fragment.last, self._seed)
        drawn = self.codistillation.batch_rows(len(rows), step, self._seed, rank)
        targets: Tensor = fragment.state["targets"].data
        return self._shared[rows[drawn]], targets.view(len(rows), -1)[drawn]

    def _outputs(self, parameters: StackedParameters, inputs: Tensor) -> Tensor:
        outputs: Tensor = functional_call(self._task.model, dict(parameters), (inputs,))
        return outputs

    def _term(self, parameters: StackedParameters, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.codistillation.disagreement(self._outputs(parameters, inputs), targets)
