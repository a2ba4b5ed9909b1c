"""Ray Train: attach inside the function that ``TorchTrainer`` runs on every worker."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from distcomp.attaching.chosen import Chosen
from distcomp.attaching.handle import Handle
from distcomp.attaching.handle import attach as attach_to
from distcomp.errors import require
from distcomp.integrations import files


def attach(model: nn.Module, optimizer: Optimizer, method: Chosen | None = None, **options: Any) -> Handle:
    """As :func:`distcomp.attach`, after ``ray.train.torch.prepare_model``, going on where Ray's checkpoint
    stopped.

    Put the handle's part into each checkpoint, on every worker:
    ``distcomp.integrations.files.save(handle, directory)`` before ``ray.train.report(metrics,
    checkpoint=Checkpoint.from_directory(directory))``; Ray lays all workers' files into one. After a failure,
    or a change of the number of workers, Ray restarts the function and what is owed is shared among those
    there are.
    """
    train = require("ray.train", "ray")
    handle = attach_to(model, optimizer, method, **options)
    checkpoint = train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as directory:
            files.resume(handle, directory)
    return handle
