"""Accelerate: attach to what ``accelerator.prepare`` returned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from distcomp.attaching.chosen import Chosen
from distcomp.attaching.handle import Handle
from distcomp.attaching.handle import attach as attach_to
from distcomp.integrations import files
from distcomp.recording import scalars


def attach(
    accelerator: Any, model: nn.Module, optimizer: Any, method: Chosen | None = None, **options: Any
) -> Handle:
    """As :func:`distcomp.attach`, with Accelerate's gradient scaler, inside its ``save_state`` and
    ``load_state``, and with what each step sent in its trackers. One process without a process group cannot
    be attached to: ask ``accelerator.num_processes > 1`` first.

    ``load_state`` then refuses a checkpoint without distcomp's part, of a run that did not compress: load
    that before attaching.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # prepare() wraps it
    handle = attach_to(model, inner, method, scaler=accelerator.scaler, **options)

    def save(models: list[nn.Module], weights: list[Any], directory: str | Path) -> None:
        files.save(handle, directory)

    def load(models: list[nn.Module], directory: str | Path) -> None:
        files.load(handle, directory)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    handle.watch(_Trackers(accelerator))
    return handle


class _Trackers:
    """What each step sent and took, in the trackers that ``init_trackers`` has made."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def __call__(self, record: Mapping[str, Any]) -> None:
        if self._accelerator.trackers:
            values = {f"distcomp/{name}": value for name, value in scalars(record).items()}
            self._accelerator.log(values, step=record["step"])
