"""Where the conversations of models are carried: here and now, or beside the computing."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from distcomp.sync.pipeline import Running, Timeline, carry
from distcomp.transports.base import Channel
from distcomp.transports.conversation import Conversation


class Lane:
    """Carries conversations in the order in which they are given.

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

    def start(self, talk: Conversation) -> Callable[[], Timeline]:
        """Carry ``talk``. The function that is returned waits for it and raises what went wrong."""
        if self._thread is not None:
            return self._thread.submit(self._carry, talk).result
        if self._stream is None:
            timeline = self._carry(talk)
            return lambda: timeline
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            timeline = self._carry(talk)

        def landed() -> Timeline:
            torch.cuda.current_stream(self._device).wait_stream(stream)
            return timeline

        return landed

    def close(self) -> None:
        """End the thread, after what it still carries."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    @torch.no_grad()
    def _carry(self, talk: Conversation) -> Timeline:
        timeline = Timeline()
        carrier = carry(self._channel, timeline)
        next(carrier)
        try:
            carrier.send(Running(talk, lambda: None))
            carrier.send(None)
        except StopIteration:
            return timeline
        raise AssertionError("the pipeline did not end")


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
