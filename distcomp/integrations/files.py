"""What a handle remembers, as one file per rank in a directory that the ranks share: a trainer's
checkpoint."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from distcomp.atomic_write import write_whole
from distcomp.attaching.handle import Handle
from distcomp.errors import DistcompError


def save(handle: Handle, directory: str | Path) -> None:
    """Write this rank's part, whole or not at all. Call it on every rank."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = handle.state_dict()
    path = _path(directory, state)
    memory = io.BytesIO()
    torch.save(state, memory)
    write_whole(path, memory.getbuffer())


def holds(directory: str | Path) -> bool:
    """Whether anything was saved there."""
    return any(Path(directory).glob("distcomp-rank*.pt"))


def load(handle: Handle, directory: str | Path) -> None:
    """Go on where :func:`save` stopped, also on another number of ranks: then what all old ranks owed is
    shared.

    Raises DistcompError where a rank's part is missing.
    """
    directory = Path(directory)
    if not holds(directory):
        raise DistcompError(
            f"{directory} holds nothing of distcomp's; name a checkpoint that was saved while a method was "
            "attached, or go on without loading"
        )
    place = handle.state_dict()
    own = _path(directory, place)
    if own.exists() and _world_size(part := _read(own)) == _world_size(place):
        handle.load_state_dict(part)
    else:
        handle.load_state_dict([_read(path) for path in sorted(directory.glob("distcomp-rank*.pt"))])


def _path(directory: Path, state: dict[str, Any]) -> Path:
    (rank,) = state
    return directory / f"distcomp-{rank}.pt"


def _read(path: Path) -> dict[str, Any]:
    part: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return part


def _world_size(state: dict[str, Any]) -> int:
    (part,) = state.values()
    return int(part["world_size"])
