"""distcomp: train with fewer bits. Communication compression for distributed PyTorch.

>>> model = DistributedDataParallel(model)                              # doctest: +SKIP
>>> handle = distcomp.attach(model, optimizer, distcomp.qsgd(bits=4))   # doctest: +SKIP
"""

import importlib
from typing import TYPE_CHECKING, Any

from distcomp.registry import when_missing
from distcomp.version import __version__ as __version__

when_missing(lambda: importlib.import_module("distcomp.public"))

if TYPE_CHECKING:
    from distcomp.public import *  # noqa: F403
    from distcomp.public import __all__ as __all__


def __getattr__(name: str) -> Any:
    """Everything public, when the first of it is asked for: importing distcomp takes no time, and
    distcomp.network no torch."""
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    public = importlib.import_module("distcomp.public")
    globals().update({one: getattr(public, one) for one in public.__all__}, __all__=public.__all__)
    try:
        return globals()[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
