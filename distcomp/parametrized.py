"""What torch's parametrizations leave to be done."""

from __future__ import annotations

from torch import nn


def own_class(module: nn.Module) -> None:
    """Give a parametrized module, before a parametrization is removed from it, a class that no other has.

    A copied module shares the class that torch made for its parametrizations, and torch removes them from
    that class: the other copy would break.
    """
    shared = type(module)
    own = {name: one for name, one in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, own)
