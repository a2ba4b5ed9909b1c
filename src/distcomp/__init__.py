"""distcomp: train with fewer bits. Communication compression for distributed PyTorch.

>>> model = DistributedDataParallel(model)                              # doctest: +SKIP
>>> handle = distcomp.attach(model, optimizer, distcomp.qsgd(bits=4))   # doctest: +SKIP
"""

from distcomp import pruning
from distcomp.attach import Handle, attach
from distcomp.errors import CorruptPayload, DistcompError, Mismatch, PeerLost, SettingsMismatch
from distcomp.methods import *  # noqa: F403  (every registered recipe is distcomp.<name>)
from distcomp.methods import __all__ as _methods
from distcomp.sync.recipes import *  # noqa: F403
from distcomp.sync.recipes import __all__ as _averagings
from distcomp.version import __version__ as __version__

__all__ = [
    "CorruptPayload",
    "DistcompError",
    "Handle",
    "Mismatch",
    "PeerLost",
    "SettingsMismatch",
    "attach",
    "pruning",
    *_averagings,
    *_methods,
]
