"""Which weights exist while we train?

A *criterion* decides which weights live, a :class:`Pruner` asks it at the right time on all ranks alike, and
:func:`distcomp.masked` sends active weights only.
"""

from distcomp.files.coding import CorruptFile
from distcomp.files.container import Size, compress, decompress, sizes
from distcomp.pruning.active import ActiveMasks, MaskSnapshot
from distcomp.pruning.correlated import correlation
from distcomp.pruning.discrimination import dcp
from distcomp.pruning.frequency import Bands, frequency
from distcomp.pruning.groups import group_lasso, ssl
from distcomp.pruning.magnitude import (
    affordable,
    dsd,
    fixed,
    gradual,
    magnitude,
    nm,
    retraining_dropout,
    sensitivity,
)
from distcomp.pruning.masks import Mask, materialize
from distcomp.pruning.pruner import Criterion, Pruner, PruningContext
from distcomp.pruning.regrowth import rigl
from distcomp.pruning.sharing import Codebook, plain_state, share
from distcomp.pruning.shrinking import shrink
from distcomp.pruning.surgery import dns
from distcomp.pruning.wire import Support

__all__ = [
    "ActiveMasks",
    "Bands",
    "Codebook",
    "CorruptFile",
    "Criterion",
    "Mask",
    "MaskSnapshot",
    "Pruner",
    "PruningContext",
    "Size",
    "Support",
    "affordable",
    "compress",
    "correlation",
    "dcp",
    "decompress",
    "dns",
    "dsd",
    "fixed",
    "frequency",
    "gradual",
    "group_lasso",
    "magnitude",
    "materialize",
    "nm",
    "plain_state",
    "retraining_dropout",
    "rigl",
    "sensitivity",
    "share",
    "shrink",
    "sizes",
    "ssl",
]
