"""What is trained, apart from how: the model, the data of each worker, the loss.

A script that lets distcomp advise on it, or train many workers in one process, defines::

    def training_task(arguments: list[str]) -> distcomp.advice.TrainingTask: ...

``arguments`` are what the script was given. See ``examples/digits.py``.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer

from distcomp.errors import DistcompError

NAME = "training_task"


@dataclass(frozen=True)
class TrainingTask:
    """``model``: as every worker begins. ``batch(worker, workers, step)``: inputs and targets, of the same
    shapes for all. ``loss(outputs, targets)``: a number. ``optimizer(parameters)`` and, where the learning
    rate changes, ``schedule(optimizer)``. ``evaluate(model)``: metrics by name, ``test_loss`` among them.
    ``shared``: unlabelled examples that all workers hold, of which codistillation exchanges predictions.

    To train many workers at once, the optimizer must treat every element alone, as SGD and Adam do.
    """

    model: nn.Module
    batch: Callable[[int, int, int], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[Iterable[Tensor]], Optimizer]
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None
    schedule: Callable[[Optimizer], LRScheduler] | None = None
    shared: Tensor | None = None


def task_of(script: Path, arguments: Sequence[str]) -> TrainingTask:
    """Run ``script`` as a module (not as ``__main__``) and ask its ``training_task()``.

    Raises DistcompError where the script has none, or what it returns is none.
    """
    import sys

    before = list(sys.path)
    sys.path.insert(0, str(script.resolve().parent))
    try:
        names: dict[str, Any] = runpy.run_path(str(script), run_name="distcomp.advice.script")
    finally:
        sys.path[:] = before
    if NAME not in names:
        raise DistcompError(
            f"{script} does not say what it trains; define training_task(arguments) in it that "
            "returns a distcomp.advice.TrainingTask, as examples/digits.py does"
        )
    made = names[NAME](list(arguments))
    if not isinstance(made, TrainingTask):
        raise DistcompError(
            f"training_task() in {script} returned a {type(made).__name__}; "
            "return a distcomp.advice.TrainingTask"
        )
    return made
