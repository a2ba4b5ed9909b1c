"""A request carried by several ranks at once, each a share of it: what ranks of a node do between nodes.

A share of a payload is an equal share of every one of its parts, with zeros behind it where it is short.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distcomp.payload import Part, Parts, Payload


def share_width(numel: int, count: int) -> int:
    """Elements of each of ``count`` shares."""
    return -(-numel // count)


def share_of(x: Tensor, index: int, into: Tensor) -> Tensor:
    """``into``, holding the ``index``-th share of the flat ``x``, and zeros behind it."""
    own = x[index * into.numel() : (index + 1) * into.numel()]
    into[: own.numel()] = own
    into[own.numel() :] = 0
    return into


def share_parts(parts: Parts, count: int) -> Parts:
    """What each of ``count`` ranks carries of a payload."""
    return tuple(Part(part.kind, part.dtype, share_width(part.numel, count)) for part in parts)


def share_of_payload(payload: Payload, index: int, count: int) -> Payload:
    """The ``index``-th of ``count`` shares."""
    share = Payload.empty(share_parts(payload.parts, count), payload.wire.device)
    for part in share.parts:
        share_of(payload[part.kind], index, share[part.kind])
    return share


def merged_parts(parts: Sequence[Parts]) -> Parts:
    """Several payloads of the same kinds laid together, kind by kind."""
    return tuple(
        Part(same[0].kind, same[0].dtype, sum(part.numel for part in same))
        for same in zip(*parts, strict=True)
    )


def merged(payloads: Sequence[Payload]) -> Payload:
    """Payloads of the same kinds as one."""
    parcel = Payload.empty(merged_parts([payload.parts for payload in payloads]), payloads[0].wire.device)
    for part in parcel.parts:
        torch.cat([payload[part.kind] for payload in payloads], out=parcel[part.kind])
    return parcel


def reassembled(parcels: Sequence[Payload], wholes: Sequence[Parts]) -> list[Payload]:
    """The payloads of ``wholes`` whose shares were merged, in that order, in every one of ``parcels``."""
    return [_reassembled(parcels, wholes, index) for index in range(len(wholes))]


def _reassembled(parcels: Sequence[Payload], wholes: Sequence[Parts], index: int) -> Payload:
    whole = Payload.empty(wholes[index], parcels[0].wire.device)
    for position, part in enumerate(whole.parts):
        widths = [share_width(whole_parts[position].numel, len(parcels)) for whole_parts in wholes]
        begin = sum(widths[:index])
        pieces = [parcel[part.kind][begin : begin + widths[index]] for parcel in parcels]
        whole[part.kind].copy_(torch.cat(pieces)[: part.numel])
    return whole
