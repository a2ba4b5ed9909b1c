"""How few numbers describe a weight?

>>> distcomp.structured.circulant(model, block=8, layers="blocks.*.fc")     # doctest: +SKIP
>>> distcomp.structured.low_rank(model, rank="evbmf")                       # doctest: +SKIP
>>> print(distcomp.structured.summary(model))                               # doctest: +SKIP

Structures are parametrizations (:mod:`distcomp.parametrize`): quantizers and masks stack on them, methods
carry their gradients. Make them before the optimizer and DistributedDataParallel. Drivers (:func:`lc`,
:func:`soft_sharing`, :func:`force_regularization`) train plain weights towards a description.
"""

from distcomp.structured.circulant import BlockCirculant, circulant
from distcomp.structured.compressions import Ternary, codebook, of_rank, pruned
from distcomp.structured.costs import Costs, LayerCost, summary
from distcomp.structured.driver import Driver
from distcomp.structured.early import restructure
from distcomp.structured.factors import CP, SVD, Tucker2, low_rank
from distcomp.structured.force import ForceRegularizer, force_regularization
from distcomp.structured.hashed import Hashed, hashed
from distcomp.structured.lc import LC, lc
from distcomp.structured.projection import RandomProjection
from distcomp.structured.ranks import chosen_rank, evbmf_rank
from distcomp.structured.reconstruction import global_error_reconstruction, reconstruct
from distcomp.structured.soft_sharing import GaussianMixturePrior, SoftSharing, soft_sharing
from distcomp.structured.sparse_basis import SparseBasis, SparseConvolution, sparse_convolution
from distcomp.structured.split import BlockDiagonal, LearnedSplit, splitnet
from distcomp.structured.structure import Seeded, Structure, install_structures
from distcomp.structured.turns import GroupsInTurn, groups_in_turn

__all__ = [
    "CP",
    "LC",
    "SVD",
    "BlockCirculant",
    "BlockDiagonal",
    "Costs",
    "Driver",
    "ForceRegularizer",
    "GaussianMixturePrior",
    "GroupsInTurn",
    "Hashed",
    "LayerCost",
    "LearnedSplit",
    "RandomProjection",
    "Seeded",
    "SoftSharing",
    "SparseBasis",
    "SparseConvolution",
    "Structure",
    "Ternary",
    "Tucker2",
    "chosen_rank",
    "circulant",
    "codebook",
    "evbmf_rank",
    "force_regularization",
    "global_error_reconstruction",
    "groups_in_turn",
    "hashed",
    "install_structures",
    "lc",
    "low_rank",
    "of_rank",
    "pruned",
    "reconstruct",
    "restructure",
    "soft_sharing",
    "sparse_convolution",
    "splitnet",
    "summary",
]
