"""Read back what ``torch.distributed.checkpoint`` saved, also on another world size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from distcomp.errors import DistcompError


def read(path: str | Path, key: str) -> dict[str, Any]:
    """All ranks' parts of what was saved as ``dcp.save({key: handle.state_dict()}, checkpoint_id=path)``.

    ``dcp.load`` fills a template; the template here is made from the checkpoint's own metadata, so that the
    parts of ranks that no longer exist are read, too. Raises DistcompError when there is no such key.
    """
    metadata = FileSystemReader(path).read_metadata()
    template: dict[str, Any] = {}
    for flat_key, place in (metadata.planner_data or {}).items():
        if place[0] != key:
            continue
        stored = metadata.state_dict_metadata[flat_key]
        node = template
        for step in place[:-1]:
            node = node.setdefault(step, {})
        if isinstance(stored, TensorStorageMetadata):
            node[place[-1]] = torch.empty(stored.size, dtype=stored.properties.dtype)
        else:
            node[place[-1]] = None
    if key not in template:
        raise DistcompError(
            f"{path} holds no {key!r}; save it there: dcp.save({{{key!r}: handle.state_dict(), ...}})"
        )
    load(template, checkpoint_id=path, no_dist=True)
    parts: dict[str, Any] = template[key]
    for part in parts.values():
        if isinstance(part, dict):
            part.setdefault("state", {})  # a method without state leaves no key behind
    return parts
