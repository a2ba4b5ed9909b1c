"""What one worker hands another that was away: anchors, the outer optimizer's state, buffers, counts.

On the wire a line of JSON, its length before it, and then the numbers of each tensor, coded or as they are.
Both ends have the same model and method, so that the receiver knows what must come; nothing else is read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.kernels import entropy
from distcomp.methods.base import State, cut_state, join_state

LENGTH = struct.Struct("!q")


@dataclass(frozen=True)
class Handover:
    """After round ``number``, at iteration ``iterations``. ``tracks``: the step of the last exchange, and how
    many there were, by fragment. ``common``: the state that all workers have alike."""

    number: int
    iterations: int
    tracks: Mapping[str, tuple[int, int]]
    common: State


def handed_over(handover: Handover, download: str) -> bytes:
    """On the wire; ``download``: ``plain``, or ``lossless``, coded by :mod:`distcomp.kernels.entropy`."""
    coded = [_coded(value, download) for leaves in _leaves(handover.common) for value in leaves]
    head = json.dumps(
        {
            "number": handover.number,
            "iterations": handover.iterations,
            "tracks": handover.tracks,
            "download": download,
            "bytes": [len(one) for one in coded],
        }
    ).encode()
    return b"".join([LENGTH.pack(len(head)), head, *coded])


def read_handover(wire: bytes, like: Handover) -> Handover:
    """What was handed over, of a worker that has ``like`` itself.

    Raises DistcompError for anything that is not of the same model and method.
    """
    try:
        (length,) = LENGTH.unpack_from(wire)
        head = json.loads(wire[LENGTH.size : LENGTH.size + length])
        number, iterations = int(head["number"]), int(head["iterations"])
        tracks = {name: (int(last), int(exchanges)) for name, (last, exchanges) in head["tracks"].items()}
        download, sizes = str(head["download"]), [int(size) for size in head["bytes"]]
        if set(tracks) != set(like.tracks) or number < 0 or min(sizes, default=0) < 0:
            raise ValueError("its fragments or sizes are others")
        if LENGTH.size + length + sum(sizes) != len(wire):
            raise ValueError(f"it has {len(wire)} bytes")
        common = _read(wire[LENGTH.size + length :], sizes, download, like.common)
    except (ValueError, KeyError, TypeError, struct.error, RuntimeError) as error:
        raise DistcompError(
            f"a worker handed over what is not of this model and method ({error}); attach all with the same "
            "model, method and version"
        ) from error
    return Handover(number, iterations, tracks, common)


def _leaves(common: State) -> list[list[Tensor]]:
    """The tensors by parameter, in an order that depends on the model and method alone."""
    return [list(leaves.values()) for leaves in cut_state(common).values()]


def _coded(value: Tensor, download: str) -> bytes:
    plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    if download == "lossless" and plain.numel():
        plain = entropy.encode(plain, periods=(value.element_size(),))
    return plain.numpy().tobytes()


def _read(wire: bytes, sizes: list[int], download: str, like: State) -> dict[str, Any]:
    own, at, cut = cut_state(like), 0, dict[str, dict[str, Tensor]]()
    if len(sizes) != sum(len(leaves) for leaves in own.values()):
        raise ValueError(f"it has {len(sizes)} tensors")
    left = iter(sizes)
    for name, leaves in own.items():
        for path, value in leaves.items():
            size = next(left)
            piece = torch.frombuffer(bytearray(wire[at : at + size]), dtype=torch.uint8) if size else None
            cut.setdefault(name, {})[path] = _decoded(piece, value, download)
            at += size
    return join_state(cut, like)


def _decoded(piece: Tensor | None, like: Tensor, download: str) -> Tensor:
    nbytes = like.numel() * like.element_size()
    if piece is None:
        piece = torch.empty(0, dtype=torch.uint8)
    elif download == "lossless":
        piece = entropy.decode(piece, nbytes)
    if piece.numel() != nbytes:
        raise ValueError(f"{piece.numel()} bytes stand for {nbytes}")
    return piece.view(like.dtype).view(like.shape)
