"""The papers' names: short functions that return an averaging with the paper's settings.

A ``period`` is a number of iterations, a Schedule, or the text of one (``"1 -> 16 @ 5000"``). What is sent
goes through ``compressor``: any gradient method, as an object or a string (``"topk:ratio=0.01"``), or a
compressor. Within an averaging a method's steps are exchanges.
"""

from distcomp.averaging.adpsgd import ad_psgd
from distcomp.averaging.des_loc import des_loc
from distcomp.averaging.eager import eager_diloco
from distcomp.averaging.muloco import muloco
from distcomp.averaging.noloco import noloco
from distcomp.averaging.pulseloco import pulseloco
from distcomp.averaging.push_sum import sgp
from distcomp.averaging.recipes.codistill import codistill
from distcomp.averaging.recipes.gossip import choco, dcd, deepsqueeze, dpsgd, ecd
from distcomp.averaging.recipes.masked import active_only, masked
from distcomp.averaging.recipes.periodic import (
    diloco,
    local_sgd,
    multi_level,
    post_local_sgd,
    pqasgd,
    sparse_averaging,
    sparse_loco,
    sparta,
    streaming_diloco,
)

__all__ = [
    "active_only",
    "ad_psgd",
    "choco",
    "codistill",
    "dcd",
    "deepsqueeze",
    "des_loc",
    "diloco",
    "dpsgd",
    "eager_diloco",
    "ecd",
    "local_sgd",
    "masked",
    "muloco",
    "multi_level",
    "noloco",
    "post_local_sgd",
    "pqasgd",
    "pulseloco",
    "sgp",
    "sparse_averaging",
    "sparse_loco",
    "sparta",
    "streaming_diloco",
]
