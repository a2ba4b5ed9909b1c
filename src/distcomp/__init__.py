"""distcomp: train with fewer bits. Communication compression for distributed PyTorch.

>>> model = DistributedDataParallel(model)                              # doctest: +SKIP
>>> handle = distcomp.attach(model, optimizer, distcomp.qsgd(bits=4))   # doctest: +SKIP
"""

__version__ = "0.1.0"

from distcomp.attach import Handle, attach
from distcomp.errors import CorruptPayload, DistcompError, Mismatch, PeerLost, SettingsMismatch
from distcomp.methods import *  # noqa: F403  (every registered recipe is distcomp.<name>)
from distcomp.methods import __all__ as _methods

__all__ = [
    "CorruptPayload",
    "DistcompError",
    "Handle",
    "Mismatch",
    "PeerLost",
    "SettingsMismatch",
    "attach",
    *_methods,
]
