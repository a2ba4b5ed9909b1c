"""How do I send a tensor of my own in few bits? torch.distributed's collectives as calls, with a codec."""

from distcomp.calls.collectives import (
    all_gather,
    all_reduce,
    all_to_all,
    broadcast,
    reduce_scatter,
)
from distcomp.calls.differentiable import gather_rows, route_rows
from distcomp.calls.line import connect, disconnect, sent_bytes
from distcomp.calls.messages import recv, send
from distcomp.calls.row_counts import exchange_counts
from distcomp.calls.stages import PackedStage, StageEdge
from distcomp.calls.work import Work

__all__ = [
    "PackedStage",
    "StageEdge",
    "Work",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "broadcast",
    "connect",
    "disconnect",
    "exchange_counts",
    "gather_rows",
    "recv",
    "reduce_scatter",
    "route_rows",
    "send",
    "sent_bytes",
]
