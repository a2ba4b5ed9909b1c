"""What calls share: which tensors they take, what must be finite in them, where answers are written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distcomp.calls.codec import as_float32, restored
from distcomp.calls.line import Call, CallLine
from distcomp.calls.work import Work
from distcomp.errors import DistcompError

OPS = ("sum", "mean")


def begin(line: CallLine, call: Call, x: Tensor, outputs: Sequence[Tensor], async_op: bool) -> Work | None:
    """Begin a call whose answer belongs into ``outputs``, end to end; wait for it unless ``async_op``.

    ``x``: what must be finite, from :func:`watched`.
    """
    work = line.begin(call, x, lambda answer: _write(answer, outputs))
    if async_op:
        return work
    work.wait()
    return None


def check_tensors(tensors: Sequence[Tensor], op: str = "sum") -> None:
    """Raise DistcompError for tensors that no call takes together, or not with this ``op``."""
    first = tensors[0]
    for tensor in tensors:
        if tensor.layout != torch.strided or hasattr(tensor, "to_local"):
            raise DistcompError(
                f"calls take dense tensors, and this one is {tensor.layout}; convert it first"
            )
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise DistcompError(
                f"tensors of one call have one dtype and lie on one device, and here are {first.dtype} on "
                f"{first.device} and {tensor.dtype} on {tensor.device}; convert them first"
            )
    if op not in OPS:
        raise DistcompError(f"op is {op!r}; use {' or '.join(OPS)}")
    if op == "mean" and not (first.is_floating_point() or first.is_complex()):
        raise DistcompError(f"the mean of whole numbers ({first.dtype}) is none; use op='sum'")


def watched(tensors: Sequence[Tensor], exact: bool) -> Tensor:
    """What must be finite, flat; nothing where everything arrives as it is."""
    if exact:
        return nothing(tensors[0].device)
    return torch.cat([as_float32(tensor.detach()) for tensor in tensors])


def nothing(device: torch.device) -> Tensor:
    """What is finite."""
    return torch.zeros(1, dtype=torch.float32, device=device)


def in_words(tensor: Tensor) -> str:
    """As ranks compare it."""
    return f"{tuple(tensor.shape)} of {tensor.dtype}"


def _write(answer: Tensor, outputs: Sequence[Tensor]) -> None:
    """A flat answer, into the outputs."""
    at = 0
    for output in outputs:
        count = output.numel() * (2 if output.is_complex() and not answer.is_complex() else 1)
        output.detach().copy_(restored(answer[at : at + count], output))
        at += count
