"""What a method is attached to: a model as the training loop calls it, and what is inside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distcomp.errors import DistcompError


@dataclass(frozen=True)
class Target:
    """``called`` by the training loop; ``module`` holds the parameters; ``ddp`` lies between, if any."""

    called: nn.Module
    module: nn.Module
    ddp: DistributedDataParallel | None
    group: dist.ProcessGroup

    @staticmethod
    def of(model: nn.Module) -> Target:
        """Looks under torch.compile's wrapper. A plain module talks over the default process group.

        Raises DistcompError where that group does not exist.
        """
        inner = getattr(model, "_orig_mod", model)
        if isinstance(inner, DistributedDataParallel):
            return Target(model, inner.module, inner, inner.process_group)
        if not dist.is_initialized():
            raise DistcompError(
                "there is no process group; call torch.distributed.init_process_group before distcomp.attach"
            )
        world = dist.group.WORLD
        assert world is not None
        return Target(model, inner, None, world)

    @property
    def key(self) -> nn.Module:
        """What belongs to the model for good, a process group for instance, is kept under this."""
        return self.ddp if self.ddp is not None else self.module

    def as_ddp(self) -> DistributedDataParallel:
        """The DDP model. Raises DistcompError where there is none: gradients are taken from DDP's buckets."""
        if self.ddp is None:
            raise DistcompError(
                f"a gradient method needs a DistributedDataParallel model, not {type(self.module).__name__}; "
                "wrap it first: model = DistributedDataParallel(model)"
            )
        return self.ddp


def uncompiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """``hook``, which torch.compile leaves to Python. Said here and not by a decorator, for that would import
    the compiler, which takes seconds, together with distcomp."""
    left_alone: Callable[..., Any] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return left_alone
