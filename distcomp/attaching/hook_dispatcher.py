"""The one communication hook of a DistributedDataParallel model.

DDP refuses a second ``register_comm_hook`` and cannot take one off. So distcomp registers one hook per model,
once and for ever; it passes each bucket to whatever is attached, or does what DDP itself does, bit for bit.
"""

# No "from __future__ import annotations" here: DDP compares the hook's annotations with the types themselves.

from collections.abc import Callable
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from distcomp.errors import DistcompError
from distcomp.transports.types import GradBucket


class BucketHook(Protocol):
    """Whatever reduces buckets."""

    def hook(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Start reducing a bucket; the future holds the new bucket."""


class HookDispatcher:
    """Dispatches each bucket to :attr:`attached`, or all-reduces it as DDP does.

    Raises DistcompError if the model already has a hook of somebody else's.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self.attached: BucketHook | None = None
        self._group = model.process_group
        try:
            model.register_comm_hook(None, self.hook)
        except RuntimeError as error:
            raise DistcompError(
                "this DistributedDataParallel model already has a communication hook and DDP allows only "
                "one; wrap the module again without register_comm_hook, then attach"
            ) from error

    def __deepcopy__(self, memo: object) -> "HookDispatcher":
        return _blank()

    def __reduce__(self) -> "tuple[Callable[[], HookDispatcher], tuple[()]]":
        return _blank, ()

    def hook(self, state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        if self.attached is not None:
            return self.attached.hook(bucket)
        return all_reduce_as_ddp(self._group, bucket)


def _blank() -> HookDispatcher:
    """What a copy of the model holds in its dispatcher's place: DDP keeps a list of hooks, and registers none
    of them anew with a copy. It leads to no process group, which nobody can copy."""
    blank = HookDispatcher.__new__(HookDispatcher)
    blank.attached = None
    return blank


def all_reduce_as_ddp(group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What DDP does without a hook. It multiplies by 1/n (it does not divide), then sums: the same bits."""
    buffer = bucket.buffer().mul_(1.0 / dist.get_world_size(group))
    future = dist.all_reduce(buffer, group=group, async_op=True).get_future()
    result: torch.futures.Future[torch.Tensor] = future.then(lambda done: done.value()[0])
    return result


_DISPATCHERS: "WeakKeyDictionary[DistributedDataParallel, HookDispatcher]" = WeakKeyDictionary()


def dispatcher_of(model: DistributedDataParallel) -> HookDispatcher:
    """The :class:`HookDispatcher` of a model, registered the first time."""
    if model not in _DISPATCHERS:
        _DISPATCHERS[model] = HookDispatcher(model)
    return _DISPATCHERS[model]
