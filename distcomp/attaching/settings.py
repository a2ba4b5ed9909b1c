"""What ranks must have in common to be attached together."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import Optimizer

from distcomp.attaching.target import Target
from distcomp.averaging.base import Averaging, MultiLevel
from distcomp.averaging.codistill import Codistillation
from distcomp.methods import Method
from distcomp.version import __version__


def settings_of(
    target: Target, method: Method | Averaging | MultiLevel | str, optimizer: Optimizer | None, seed: int
) -> dict[str, str]:
    """Each setting in words."""
    ddp = target.ddp
    return {
        "method": str(method),
        "method in full": repr(method),
        "seed": str(seed),
        "bucket_cap_bytes": str(getattr(ddp, "bucket_bytes_cap", None)),
        "find_unused_parameters": str(getattr(ddp, "find_unused_parameters", None)),
        "static_graph": str(getattr(ddp, "static_graph", None)),
        "replicas": str(target.replicas is not None),
        "inside": repr(target.inside),
        "optimizer": type(optimizer).__name__,
        "distcomp": __version__,
    }


def details_of(
    target: Target, method: Method | Averaging | MultiLevel | str | None = None
) -> dict[str, list[str]]:
    """Long lists, of which ranks compare digests, and say only what differs. Parameters that
    DistributedDataParallel was told to ignore are each rank's own, and all are where predictions are
    exchanged."""
    if isinstance(method, Codistillation) and method.own_models and target.ddp is None:
        return {}
    parameters = target.module.named_parameters()
    return {
        "parameters": [
            f"{name} {tuple(p.shape)} {p.dtype}, requires_grad={p.requires_grad}"
            for name, p in parameters
            if name not in target.ignored
        ]
    }


def examples_of(
    target: Target, method: Method | Averaging | MultiLevel | str, shared: Tensor | None
) -> dict[str, str]:
    """What ranks compare of the shared examples. Distillation is imported where there may be some."""
    if shared is None and not isinstance(method, Codistillation):
        return {}
    from distcomp.attaching.predictions import check_shared

    return check_shared(target, method, shared)
