"""A training loop in the style of torchtitan: FSDP2 over a device mesh, checkpoints by
``torch.distributed.checkpoint``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from distcomp.attaching.chosen import Chosen
from distcomp.attaching.handle import Handle
from distcomp.attaching.handle import attach as attach_to

KEY = "distcomp"


def attach(
    model: nn.Module, optimizer: Optimizer, method: Chosen | None, mesh: Any, **options: Any
) -> Handle:
    """As :func:`distcomp.attach`, for a model that was sharded over ``mesh["dp_shard"]``.

    Where the mesh has a dimension ``dp_replicate``, too (hybrid sharding), the method averages across it, and
    FSDP reduces inside each replica as before.
    """
    across = "dp_replicate" in (mesh.mesh_dim_names or ()) and mesh["dp_replicate"].size() > 1
    replicas = mesh["dp_replicate"].get_group() if across else None
    return attach_to(model, optimizer, method, replicas=replicas, **options)


def save(directory: str | Path, model: nn.Module, optimizer: Optimizer, handle: Handle) -> None:
    """Weights, optimizer and what the method remembers, in one distributed checkpoint. Call it on every
    rank."""
    weights, moments = get_state_dict(model, optimizer)
    state_dict_saver.save(
        {"model": weights, "optimizer": moments, KEY: handle.state_dict()}, checkpoint_id=directory
    )


def load(directory: str | Path, model: nn.Module, optimizer: Optimizer, handle: Handle) -> None:
    """Go on where :func:`save` stopped."""
    weights, moments = get_state_dict(model, optimizer)
    state_dict_loader.load({"model": weights, "optimizer": moments}, checkpoint_id=directory)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    handle.load_checkpoint(directory, KEY)
