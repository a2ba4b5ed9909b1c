"""What trainers' callbacks share: the method that they attach; and one process, a world of one, where they
attach none: it has nobody to say anything to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from distcomp.attaching.chosen import Chosen
from distcomp.attaching.handle import Handle, attach
from distcomp.attaching.target import has_process_group
from distcomp.errors import DistcompError


class Alone:
    """What stands in a handle's place there: nothing is sent, and what a checkpoint remembers is kept."""

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {}

    def stats(self) -> dict[str, Any]:
        return {
            "method": "none",
            "iterations": 0,
            "payload_bytes": 0,
            "payload_by_kind": {},
            "state_bytes": 0,
        }

    def log(self, **fields: Any) -> None:
        """There is no record of what sends nothing."""

    def state_dict(self) -> dict[str, Any]:
        return self._kept

    def gather_state_dicts(self) -> dict[str, Any]:
        return self._kept

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self._kept = dict(saved)

    def detach(self) -> None:
        """There is nothing to leave."""


def attached_or_alone(join: Callable[[], Handle], model: Any, rank_count: int) -> Handle | Alone:
    """What ``join`` attaches; in a single process without a process group a stand-in, with a warning.

    Raises DistcompError where there are several processes and yet no process group.
    """
    if has_process_group() or not isinstance(model, nn.Module):
        return join()
    if rank_count > 1:
        raise DistcompError(
            f"the trainer counts {rank_count} processes, which share no process group; choose a strategy "
            "that makes one, such as ddp"
        )
    warnings.warn(
        "one process trains alone, so that nothing is sent and nothing compressed; start several, with "
        "torchrun --nproc-per-node 2 or the trainer's own option",
        stacklevel=4,  # the trainer, which called its callback
    )
    return Alone()


class AttachingCallback:
    """A trainer's callback that attaches a method while it trains. ``handle`` is there from then on."""

    handle: Handle | Alone | None = None

    def __init__(self, method: Chosen | None = None, **options: Any) -> None:
        self._method, self._options = method, options

    def _attach(self, model: Any, optimizer: Any, scaler: Any, rank_count: int) -> Handle | Alone:
        self.handle = attached_or_alone(
            lambda: attach(model, optimizer, self._method, scaler=scaler, **self._options), model, rank_count
        )
        return self.handle

    def _last_payload_bytes(self) -> int | None:
        """What the last step sent; None before the first."""
        last = self.handle.stats().get("last") if self.handle is not None else None
        return None if last is None else int(last["payload_bytes"])
