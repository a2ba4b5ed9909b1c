"""Lightning: a callback that attaches when training starts and detaches at its end, on the CPU, too, where
Lightning's own ``ddp_comm_hook`` is not registered."""

from __future__ import annotations

from typing import Any

from distcomp.attaching.chosen import Chosen
from distcomp.attaching.handle import Handle
from distcomp.errors import require
from distcomp.integrations.alone import AttachingCallback

Callback: Any = require("lightning.pytorch", "lightning").Callback


class Compression(AttachingCallback, Callback):
    """``Trainer(strategy="ddp", callbacks=[Compression("qsgd:bits=4")])``; any method that ``attach`` takes.

    What the method remembers is in Lightning's own checkpoint: rank 0 gathers it from all ranks when it
    saves, and so needs memory for all of them. ``handle`` is there while it trains. ``options`` are those
    of :func:`distcomp.attach`. A single process sends nothing, and trains as without this.
    """

    def __init__(self, method: Chosen | None = None, **options: Any) -> None:
        super().__init__(method, **options)
        self._saved, self._to_load = dict[str, Any](), dict[str, Any]()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        optimizer = trainer.optimizers[0] if len(trainer.optimizers) == 1 else None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        handle = self._attach(trainer.strategy.model, optimizer, scaler, trainer.world_size)
        if self._to_load:
            handle.load_state_dict(self._to_load)
            self._to_load = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        """What the step sent, in Lightning's own logs: ``distcomp/payload_bytes``."""
        if (sent_bytes := self._last_payload_bytes()) is not None:
            pl_module.log("distcomp/payload_bytes", float(sent_bytes))

    def state_dict(self) -> dict[str, Any]:
        """All ranks' parts, on rank 0. Lightning calls it on every rank and saves what rank 0 has."""
        if self.handle is not None:
            self._saved = self.handle.gather_state_dicts()
        return self._saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = self._to_load = state_dict

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.handle is not None:
            self.state_dict()  # for a checkpoint that is asked for after the training
            self.handle.detach()
            self.handle = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if isinstance(self.handle, Handle):
            self.handle.__exit__(type(exception), exception, None)
        self.handle = None
