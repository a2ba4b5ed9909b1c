"""Transformers: a callback of its ``Trainer``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from distcomp.attaching.chosen import Chosen
from distcomp.attaching.handle import Handle
from distcomp.errors import DistcompError, require
from distcomp.integrations import files
from distcomp.integrations.alone import AttachingCallback

TrainerCallback: Any = require("transformers", "transformers").TrainerCallback


class Compression(AttachingCallback, TrainerCallback):
    """``trainer.add_callback(Compression(trainer, "qsgd:bits=4"))``; any method that ``attach`` takes.

    Attaches when training begins, detaches at its end, and keeps one file per rank in each of the trainer's
    checkpoints. A resumed training reads them from ``output_dir/checkpoint-<step>``. ``handle`` is there from
    the beginning of training on; ``options`` are those of :func:`distcomp.attach`.
    """

    def __init__(self, trainer: Any, method: Chosen | None = None, **options: Any) -> None:
        if not hasattr(trainer, "model_wrapped"):
            raise DistcompError(
                f"{trainer!r} stands in the trainer's place; write trainer.add_callback(Compression(trainer, "
                "'qsgd:bits=4'))"
            )
        super().__init__(method, **options)
        self._trainer = trainer  # a callback is handed the bare model, never the one that communicates

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        trainer = self._trainer
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        handle = self._attach(trainer.model_wrapped, optimizer, trainer.accelerator.scaler, args.world_size)
        called = trainer.callback_handler.callbacks
        called.insert(0, called.pop(called.index(self)))  # what it adds to a log is there for the others
        directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.global_step and isinstance(handle, Handle) and not files.resume(handle, directory):
            warnings.warn(
                f"{directory} holds nothing of distcomp's: training goes on with nothing owed", stacklevel=2
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        """What the last step sent, in the trainer's own logs: ``distcomp_payload_bytes``."""
        sent_bytes = self._last_payload_bytes()
        for log in () if sent_bytes is None or logs is None else (logs, *state.log_history[-1:]):
            log["distcomp_payload_bytes"] = sent_bytes

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if isinstance(self.handle, Handle):
            files.save(self.handle, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        assert self.handle is not None
        self.handle.detach()
