"""Transformers: a callback of its ``Trainer``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from distcomp.attaching.handle import Chosen, Handle, attach
from distcomp.errors import require
from distcomp.integrations import files

TrainerCallback: Any = require("transformers", "transformers").TrainerCallback


class Compression(TrainerCallback):
    """``trainer.add_callback(Compression(trainer, "qsgd:bits=4"))``; any method that ``attach`` takes.

    Attaches when training begins, detaches at its end, and keeps one file per rank in each of the trainer's
    checkpoints. A resumed training reads them from ``output_dir/checkpoint-<step>``. ``handle`` is there from
    the beginning of training on; ``options`` are those of :func:`distcomp.attach`.
    """

    def __init__(self, trainer: Any, method: Chosen | None = None, **options: Any) -> None:
        self.handle: Handle | None = None
        self._trainer = trainer  # a callback is handed the bare model, never the one that communicates
        self._method = method
        self._options = options

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        trainer = self._trainer
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        scaler = trainer.accelerator.scaler
        self.handle = attach(trainer.model_wrapped, optimizer, self._method, scaler=scaler, **self._options)
        if state.global_step == 0:
            return
        if files.holds(_checkpoint(args, state)):
            files.load(self.handle, _checkpoint(args, state))
        else:
            warnings.warn(
                f"{_checkpoint(args, state)} holds nothing of distcomp's: training goes on with nothing owed",
                stacklevel=2,
            )

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        assert self.handle is not None
        files.save(self.handle, _checkpoint(args, state))

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        assert self.handle is not None
        self.handle.detach()


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
