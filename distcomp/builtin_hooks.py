"""PyTorch's own reductions, by the names under which they are compared with ours: one table for everybody."""

from __future__ import annotations

from dataclasses import dataclass

from distcomp.errors import DistcompError


@dataclass(frozen=True)
class BuiltinHook:
    """One of PyTorch's own reductions: its name, what it does, and the bytes of each value that it sums
    around a ring (None where that depends on the layer: its step is not predicted)."""

    name: str
    summary: str
    bytes_per_value: int | None


BUILTIN_HOOKS = {
    hook.name: hook
    for hook in (
        BuiltinHook("ddp", "DistributedDataParallel as it is: a float32 all-reduce. The baseline.", 4),
        BuiltinHook("torch:fp16", "PyTorch's fp16_compress_hook.", 2),
        BuiltinHook("torch:powersgd", "PyTorch's powerSGD_hook; torch:powersgd:rank=2 sets the rank.", None),
    )
}


def is_builtin(method: object) -> bool:
    """Whether a method's text is meant to name one of PyTorch's own reductions."""
    return isinstance(method, str) and (method in BUILTIN_HOOKS or method.startswith("torch:"))


def parse_builtin(text: str) -> tuple[BuiltinHook, int | None]:
    """The hook that a text names, and its rank where it says one: ``torch:powersgd:rank=2``.

    Raises DistcompError for any other text.
    """
    hook = BUILTIN_HOOKS.get(text)
    if hook is not None:
        return hook, None
    name, _, rank = text.partition(":rank=")
    if name == "torch:powersgd" and rank.isdecimal() and int(rank) > 0:
        return BUILTIN_HOOKS[name], int(rank)
    raise DistcompError(
        f"{text!r} is none of PyTorch's hooks that run here; use {', '.join(BUILTIN_HOOKS)} or "
        "torch:powersgd:rank=2"
    )
