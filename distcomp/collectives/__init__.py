"""What may one worker ask of the others? One file for each collective, with all that is known of it."""

from distcomp.collectives.all_gather import AllGather
from distcomp.collectives.all_reduce import (
    DIRECT_BYTES,
    AllReduce,
    all_reduce_sent_bytes,
    in_rank_order,
    is_summed_directly,
    is_summed_in_pieces,
)
from distcomp.collectives.all_to_all import AllToAll
from distcomp.collectives.base import (
    Group,
    Pending,
    Primitives,
    Request,
    Sealed,
    SharedAnswers,
    Traffic,
    zeros,
)
from distcomp.collectives.broadcast import Broadcast
from distcomp.collectives.neighbor_exchange import NeighborExchange
from distcomp.collectives.push import Push
from distcomp.collectives.reduce_scatter import ReduceScatter
from distcomp.collectives.rounds import Rounds, once, partitioned, partitioned_bytes, within

__all__ = [
    "DIRECT_BYTES",
    "AllGather",
    "AllReduce",
    "AllToAll",
    "Broadcast",
    "Group",
    "NeighborExchange",
    "Pending",
    "Primitives",
    "Push",
    "ReduceScatter",
    "Request",
    "Rounds",
    "Sealed",
    "SharedAnswers",
    "Traffic",
    "all_reduce_sent_bytes",
    "in_rank_order",
    "is_summed_directly",
    "is_summed_in_pieces",
    "once",
    "partitioned",
    "partitioned_bytes",
    "within",
    "zeros",
]
