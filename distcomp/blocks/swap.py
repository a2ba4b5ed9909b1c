"""Put a block in the place of convolutions, and copy what can be copied."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from distcomp.blocks.base import Maker
from distcomp.errors import DistcompError


@dataclass(frozen=True)
class Swapped:
    """One convolution that was replaced: parameters before and after, and what was taken over."""

    name: str
    before: int
    after: int
    copied: tuple[str, ...]


def swap(model: nn.Module, match: str, make: Maker) -> list[Swapped]:
    """Replace the 2-D convolutions whose names match (``*`` as in a shell) by what ``make`` gives for each.

    The block is on the device and of the type of the convolution, in its mode, and has taken over what it can
    (``copy_from``): the bias; the weight, or the nearest to it, where the block has a place for it.
    Everything else is new: train on. Call it before the optimizer and DistributedDataParallel are made.
    Returns what was done.

    Raises DistcompError, and changes nothing, where no convolution matches, one is used twice or
    parametrized, or a block has no such geometry.
    """
    inner: Any = getattr(model, "_orig_mod", model)
    if inner is not model or any(name.startswith("module.") for name, _ in model.named_parameters()):
        raise DistcompError(
            "the model is wrapped already, and would not know new parameters; swap first, then wrap"
        )
    convolutions = {name: part for name, part in model.named_modules() if isinstance(part, nn.Conv2d)}
    chosen = {name: part for name, part in convolutions.items() if fnmatchcase(name, match)}
    if not chosen:
        known = ", ".join(convolutions) or "none"
        raise DistcompError(f"{match!r} names no 2-D convolution; there are: {known}")
    if "" in chosen:
        raise DistcompError("the model is a convolution itself; call the maker with it: block = make(model)")
    for name, conv in chosen.items():
        owners = sum(child is conv for part in model.modules() for child in part._modules.values())
        if owners > 1 or parametrize.is_parametrized(conv):
            what = f"used in {owners} places" if owners > 1 else "parametrized"
            raise DistcompError(
                f"{name} is {what}; untie it, or take its parametrizations off, before it is replaced"
            )
    made = [(name, conv, make(conv)) for name, conv in chosen.items()]
    return [_replaced(model, name, conv, block) for name, conv, block in made]


def _replaced(model: nn.Module, name: str, conv: nn.Conv2d, block: nn.Module) -> Swapped:
    path, _, last = name.rpartition(".")
    block.to(conv.weight.device, conv.weight.dtype).train(conv.training)
    copy_from = getattr(block, "copy_from", None)
    copied = tuple(copy_from(conv)) if copy_from is not None else ()
    setattr(model.get_submodule(path), last, block)
    return Swapped(name, _numbers(conv), _numbers(block), copied)


def _numbers(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())
