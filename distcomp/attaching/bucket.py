"""A bucket of DistributedDataParallel on its way, and what is asked of a loss scale."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from distcomp.active import NOTHING_OBSERVED, Observed
from distcomp.layout import Layout


class Scaler(Protocol):
    """What is asked of a GradScaler: to multiply by its scale."""

    def scale(self, outputs: Tensor) -> Tensor:
        """``outputs`` times the loss scale."""


def scale_of(scaler: Scaler | None, device: torch.device) -> Tensor | None:
    """What a scaler multiplies by, a float32 scalar; None without one."""
    return None if scaler is None else scaler.scale(torch.ones((), device=device, dtype=torch.float32))


class Bucket:
    """A bucket on its way; DDP waits for its ``future``."""

    def __init__(
        self,
        layout: Layout,
        buffer: Tensor,
        scale: Tensor | None,
        observed: Observed = NOTHING_OBSERVED,
        raises: bool = True,
    ) -> None:
        self._raises = raises
        self.layout = layout
        self.observed = observed
        self.buffer = buffer
        self.scale = scale
        self._answer: Tensor | BaseException | None = None
        devices: list[int | str | torch.device] | None = (
            None if buffer.device.type == "cpu" else [buffer.device]
        )
        self._answered: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
        self.future: torch.futures.Future[Tensor] = self._answered.then(self._deliver)

    def answer_with(self, estimate: Tensor) -> None:
        """Let DDP go on with the estimate, in the units and the type of its buffer."""
        scaled = estimate if self.scale is None else estimate * self.scale
        self.answer(scaled.to(self.buffer.dtype))

    def answer(self, answer: Tensor | BaseException) -> None:
        """Let DDP go on, with the new bucket or with an error. The first answer counts."""
        if self._answer is None:
            self._answer = answer
            self._answered.set_result(self.buffer if isinstance(answer, BaseException) else answer)

    def _deliver(self, answered: torch.futures.Future[Tensor]) -> Tensor:
        if self._raises and isinstance(self._answer, BaseException):  # set_exception garbles it
            raise self._answer
        return answered.value()
