"""The names of ``distcomp`` itself. They bring torch, so they come when the first of them is asked for."""

from distcomp import pruning
from distcomp.attaching.handle import Handle, attach
from distcomp.averaging.recipes import *  # noqa: F403
from distcomp.averaging.recipes import __all__ as _averagings
from distcomp.errors import CorruptPayload, DistcompError, Mismatch, PeerLost, SettingsMismatch
from distcomp.methods import *  # noqa: F403  (every registered recipe is distcomp.<name>)
from distcomp.methods import __all__ as _methods
from distcomp.transports.rendezvous import init_process_group

__all__ = [
    "CorruptPayload",
    "DistcompError",
    "Handle",
    "Mismatch",
    "PeerLost",
    "SettingsMismatch",
    "attach",
    "init_process_group",
    "pruning",
    *_averagings,
    *_methods,
]
