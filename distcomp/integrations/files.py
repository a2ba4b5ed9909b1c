"""What a handle remembers, as one file per rank in a directory that the ranks share: a trainer's
checkpoint."""

from __future__ import annotations

import io
from collections.abc import Mapping
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


def was_saved(directory: str | Path) -> bool:
    """Whether anything was saved there."""
    return any(Path(directory).glob("distcomp-rank*.pt"))


def load(handle: Handle, directory: str | Path) -> None:
    """Go on where :func:`save` stopped, also on another number of ranks: then what all old ranks owed is
    shared.

    Raises DistcompError where a rank's part is missing.
    """
    own = handle.state_dict()
    handle.load_from(lambda: _parts(Path(directory), own))


def resume(handle: Handle, directory: str | Path) -> bool:
    """:func:`load` where anything was saved; whether it was."""
    saved = was_saved(directory)
    if saved:
        load(handle, directory)
    return saved


def _parts(directory: Path, state: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
    """This rank's part, if it is of the same ranks; else all parts."""
    if not was_saved(directory):
        raise DistcompError(
            f"{directory} holds nothing of distcomp's; name a checkpoint that was saved while a method was "
            "attached, or go on without loading"
        )
    own = _path(directory, state)
    if own.exists() and _ranks(part := _read(own)) == _ranks(state):
        return part
    return [_read(path) for path in sorted(directory.glob("distcomp-rank*.pt"))]


def _path(directory: Path, state: dict[str, Any]) -> Path:
    (rank,) = state
    return directory / f"distcomp-{rank}.pt"


def _read(path: Path) -> dict[str, Any]:
    """A file's part. Raises DistcompError for a file that is damaged or none of :func:`save`'s."""
    try:
        part = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a file that is none of its own
        raise DistcompError(
            f"{path} cannot be read ({type(error).__name__}); use a checkpoint that was saved in whole"
        ) from None
    if not isinstance(part, dict):
        raise DistcompError(f"{path} holds no state of a method; use a checkpoint that was saved in whole")
    return part


def _ranks(state: Mapping[str, Any]) -> object:
    """The ranks that a part says it is one of; what it is otherwise, its reader checks."""
    part = next(iter(state.values()), None)
    return part.get("ranks") if isinstance(part, Mapping) else None
