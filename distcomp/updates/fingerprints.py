"""One number of 64 bits for all tensors of a state dict, however they are sharded.

It is a sum over all words of all tensors (:func:`distcomp.kernels.words.fingerprint`), keyed by name, dtype
and shape: shards add up, and what an update changes is known from the words that it changes alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distcomp.kernels.words import M64, fingerprint_at, signed64
from distcomp.kernels.words import fingerprint as words_fingerprint
from distcomp.updates.blocks import BLOCK
from distcomp.updates.pieces import LocalPiece, local_pieces, tensors_of
from distcomp.updates.words import words_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def state_fingerprint(model_or_state: nn.Module | Mapping[str, Any]) -> int:
    """``sum_i mix(seed(name, dtype, shape) + word_i + (i + 1) gamma) mod 2^64`` over all tensors' words.

    Names that share memory count each. Where tensors are sharded, all ranks of their mesh call it alike, and
    an all-reduce of 24 bytes adds up what they hold.
    """
    pieces = local_pieces(tensors_of(model_or_state))
    return total([(piece, (piece_fingerprint(piece), 0)) for piece in pieces], pieces)[0][0]


def piece_fingerprint(piece: LocalPiece) -> int:
    """The terms of the words that lie here."""
    words, first = words_of(piece.local.contiguous()), piece.box.first
    if first is not None:
        return words_fingerprint(words, seed=piece.box.seed, first=first)
    sum_ = 0
    for start in range(0, words.numel(), BLOCK):
        block = words[start : start + BLOCK]
        places = torch.arange(start, start + block.numel(), device=words.device)
        sum_ += fingerprint_at(block, piece.box.in_whole(places), seed=piece.box.seed)
    return sum_ & M64


def total(
    terms: Sequence[tuple[LocalPiece, tuple[int, int]]], pieces: Sequence[LocalPiece], failed: bool = False
) -> tuple[tuple[int, int], bool]:
    """Two sums of the terms of all ranks of the pieces' meshes, and whether any rank failed."""
    plain = [term for piece, term in terms if piece.mesh is None]
    sums, any_failed = _added(plain), failed
    # A plain tensor of a sharded model is counted by each rank for itself, for all have it.
    meshes = {id(piece.mesh): piece.mesh for piece in pieces if piece.mesh is not None}
    for key, mesh in meshes.items():
        own = _added([term for piece, term in terms if piece.speaks and id(piece.mesh) == key])
        of_mesh = _over(mesh, torch.tensor([*map(signed64, own), int(failed)], dtype=torch.int64))
        sums = _added([sums, (int(of_mesh[0]), int(of_mesh[1]))])
        any_failed |= bool(of_mesh[2])
    return sums, any_failed


def _added(terms: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return sum(one for one, _ in terms) & M64, sum(other for _, other in terms) & M64


def _over(mesh: DeviceMesh, numbers: Tensor) -> Tensor:
    # int64 sums wrap, as sums modulo 2^64 should.
    numbers = numbers.to(mesh.device_type)
    for dimension in range(mesh.ndim):
        dist.all_reduce(numbers, group=cast(Any, mesh.get_group(dimension)))
    return numbers.cpu()
