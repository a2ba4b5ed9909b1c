"""Where the exchanges of models are carried: here and now, or beside the computing."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.channel import Channel
from distcomp.runtime.pipeline import Drive, Timeline


class Executor:
    """Carries exchanges in the order in which they are given.

    ``beside``: while the caller computes; on a thread of its own for the CPU, on a side stream of a GPU.
    """

    def __init__(self, channel: Channel, device: torch.device, beside: bool) -> None:
        self._channel = channel
        self._device = device
        on_cpu = device.type == "cpu"
        self._thread = (
            ThreadPoolExecutor(1, thread_name_prefix="distcomp-exchange") if beside and on_cpu else None
        )
        self._stream = None if on_cpu or not beside else _stream(device)

    def start(self, aggregation: Aggregation) -> Callable[[], Timeline]:
        """Carry ``aggregation``. The function that is returned waits for it and raises what went wrong."""
        if self._thread is not None:
            return self._thread.submit(self._drive, aggregation).result
        if self._stream is None:
            timeline = self._drive(aggregation)
            return lambda: timeline
        # x may still be being written on the caller's stream: this one waits for it, the host for neither.
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            timeline = self._drive(aggregation)

        def arrived() -> Timeline:
            torch.cuda.current_stream(self._device).wait_stream(stream)
            return timeline

        return arrived

    def close(self) -> None:
        """End the thread, after what it still carries."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    @torch.no_grad()
    def _drive(self, aggregation: Aggregation) -> Timeline:
        drive = Drive(self._channel)
        drive.add(aggregation)
        drive.end()
        return drive.timeline


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
