"""What stands in a weight's place: install it, stack it, take it off again, count the bits.

>>> distcomp.parametrize.install(model, "fc.weight", LowRank(8))                        # doctest: +SKIP
>>> distcomp.parametrize.remove(model, "fc.weight", "structured", densify=True)         # doctest: +SKIP

Quantizers (:mod:`distcomp.precision`), masks and shared codebooks (:mod:`distcomp.pruning`) are
parametrizations; one of your own is a class with ``decode`` and ``right_inverse``. They stand on torch's
``torch.nn.utils.parametrize``: state dicts, DistributedDataParallel, FSDP2, copies and ``torch.compile`` go
on working.
"""

from distcomp.parametrize.base import Order, Parametrization, Storage
from distcomp.parametrize.chain import (
    bits,
    chain,
    evaluating,
    install,
    latent,
    materialize,
    parameters,
    remove,
)

__all__ = [
    "Order",
    "Parametrization",
    "Storage",
    "bits",
    "chain",
    "evaluating",
    "install",
    "latent",
    "materialize",
    "parameters",
    "remove",
]
