"""Transformers: a callback of its ``Trainer``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from distcomp.attaching.handle import Chosen, Handle, attach
from distcomp.errors import DistcompError, require
from distcomp.integrations import files
from distcomp.integrations.alone import Alone, attached_or_alone

TrainerCallback: Any = require("transformers", "transformers").TrainerCallback


class Compression(TrainerCallback):
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
        self.handle: Handle | Alone | None = None
        self._trainer = trainer  # a callback is handed the bare model, never the one that communicates
        self._method = method
        self._options = options

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        trainer = self._trainer
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        scaler = trainer.accelerator.scaler
        model = trainer.model_wrapped
        self.handle = attached_or_alone(
            lambda: attach(model, optimizer, self._method, scaler=scaler, **self._options),
            model,
            args.world_size,
        )
        called = trainer.callback_handler.callbacks
        called.insert(0, called.pop(called.index(self)))  # what it adds to a log is there for the others
        if state.global_step == 0 or isinstance(self.handle, Alone):
            return
        if files.was_saved(_checkpoint(args, state)):
            files.load(self.handle, _checkpoint(args, state))
        else:
            warnings.warn(
                f"{_checkpoint(args, state)} holds nothing of distcomp's: training goes on with nothing owed",
                stacklevel=2,
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        """What the last step sent, in the trainer's own logs: ``distcomp_payload_bytes``."""
        last = self.handle.stats().get("last") if self.handle is not None else None
        if last is None or logs is None:
            return
        logs["distcomp_payload_bytes"] = last["payload_bytes"]
        if state.log_history:
            state.log_history[-1]["distcomp_payload_bytes"] = last["payload_bytes"]

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if isinstance(self.handle, Alone):
            return
        assert self.handle is not None
        files.save(self.handle, _checkpoint(args, state))

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        assert self.handle is not None
        self.handle.detach()


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
