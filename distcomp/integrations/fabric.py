"""Lightning Fabric: attach to what ``fabric.setup`` returned."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distcomp.attaching.chosen import Chosen
from distcomp.attaching.handle import Handle
from distcomp.attaching.handle import attach as attach_to


def attach(
    fabric: Any, model: nn.Module, optimizer: Any, method: Chosen | None = None, **options: Any
) -> Handle:
    """As :func:`distcomp.attach`, inside Fabric's wrappers and with its gradient scaler.

    ``model`` and ``optimizer`` are what ``fabric.setup`` returned, under the strategy ``ddp`` or with a model
    that FSDP2 sharded. Fabric's own checkpoint does not hold what the method remembers: put it beside, with
    ``distcomp.integrations.files.save`` and ``resume``.
    """
    wrapped = [child for child in model.children() if isinstance(child, DistributedDataParallel)]
    inner = wrapped[0] if wrapped else getattr(model, "module", model)
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    return attach_to(inner, getattr(optimizer, "optimizer", optimizer), method, scaler=scaler, **options)
