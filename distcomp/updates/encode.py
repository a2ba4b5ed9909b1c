"""From two versions of a state dict to the update between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distcomp.errors import DistcompError
from distcomp.kernels.words import M64, changed_words, fingerprint_at
from distcomp.updates.blocks import BLOCK, encode_block, entropy_number
from distcomp.updates.fingerprints import piece_fingerprint
from distcomp.updates.pieces import Box, LocalPiece, local_pieces, tensors_of
from distcomp.updates.update import Update, UpdatePiece
from distcomp.updates.words import words_of

ModelOrState = nn.Module | Mapping[str, Any]
"""A model, or a state dict: tensors by name."""


def encode(
    old: ModelOrState | None,
    new: ModelOrState,
    number: int = 1,
    *,
    entropy: str = "zlib",
    before: int | None = None,
) -> Update:
    """The update that turns ``old`` into ``new``, bit for bit: ``apply(old, encode(old, new))`` is ``new``.

    ``old``, ``new``: models or state dicts of the same names, dtypes and shapes; without ``old``, a key
    frame, which gives all of ``new`` whatever is there. Any dtype. Names that share memory are sent once.
    Where tensors are DTensors, each rank encodes its own shard into a part (:func:`merge_parts`).

    ``number``: of the version. ``entropy``: "none", "zlib" or "zstd" (``pip install 'distcomp[zstd]'``; the
    receivers, too). ``before``: the fingerprint of ``old``, where it is known: what lies on this rank of it.

    Size: for each changed word about ``2 + log2(words / changed)`` bits of index and 1 of direction, more if
    it moved by more than one unit in the last place; the table of names, deflated; 68 bytes.

    Memory: beside ``old`` and ``new`` what the update takes, some blocks of 2^18 words, and a copy of
    the largest tensor that is not contiguous, of each version.

    Raises DistcompError where the two are not alike in names, dtypes and shapes, or hold no dense tensors.
    """
    stage = entropy_number(entropy)
    pieces = local_pieces(tensors_of(new))
    olds = None if old is None else {p.box.name: p for p in _alike_pieces(tensors_of(old), pieces)}
    part, parts = _part_of(pieces)
    encoded: list[UpdatePiece] = []
    written: dict[tuple[object, ...], int] = {}
    sums = [0, 0]
    for piece in (piece for piece in pieces if piece.speaks):
        previous = None if olds is None else olds[piece.box.name]
        alias = written.get(piece.memory) if piece.local.numel() else None
        if alias is not None and not _were_alike(olds, encoded[alias].box.name, piece.box.name):
            alias = None
        blocks, terms = _blocks(piece, previous, stage if alias is None else None)
        sums = [sums[0] + terms[0], sums[1] + terms[1]]
        written.setdefault(piece.memory, len(encoded))
        encoded.append(UpdatePiece(piece.box, blocks, alias))
    if olds is None:
        return Update(number, True, 0, sums[1] & M64, tuple(encoded), part, parts)
    if before is None:
        before = local_fingerprint(list(olds.values()))
    after = before + sums[1] - sums[0]
    return Update(number, False, before, after & M64, tuple(encoded), part, parts)


def local_fingerprint(pieces: list[LocalPiece]) -> int:
    """The terms that this rank contributes: what a part's fingerprints count."""
    return sum(piece_fingerprint(piece) for piece in pieces if piece.speaks) & M64


def _part_of(pieces: list[LocalPiece]) -> tuple[int, int]:
    """This rank's number in the mesh over which the state is sharded, and the ranks of that."""
    meshes = {id(piece.mesh): piece.mesh for piece in pieces if piece.mesh is not None}
    if not meshes:
        return 0, 1
    if len(meshes) > 1 and len({tuple(mesh.mesh.flatten().tolist()) for mesh in meshes.values()}) > 1:
        raise DistcompError(
            "the tensors are sharded over different meshes; encode those of one mesh at a time"
        )
    mesh = next(iter(meshes.values()))
    ranks = mesh.mesh.flatten().tolist()
    return ranks.index(mesh.get_rank()), len(ranks)


def _alike_pieces(old: Mapping[str, Tensor], new: list[LocalPiece]) -> list[LocalPiece]:
    """The old state's pieces, if they are of the same boxes. Raises DistcompError naming the first
    difference."""
    before = local_pieces(old)
    missing = {piece.box.name for piece in new} ^ set(old)
    if missing:
        raise DistcompError(
            f"{min(missing)} is in one version and not in the other; encode(None, new) gives all"
        )
    for mine, theirs in zip(before, new, strict=True):
        if mine.box != theirs.box:
            raise DistcompError(
                f"{theirs.box.name} was {_about(mine.box)} and is {_about(theirs.box)}; encode(None, new) "
                "gives all of it"
            )
    return before


def _about(box: Box) -> str:
    where = "" if box.is_whole else f", of which {box.sizes} from {box.offsets} on lie here"
    return f"{box.shape} of {box.dtype}{where}"


def _were_alike(olds: Mapping[str, LocalPiece] | None, one: str, other: str) -> bool:
    """Whether two names that share memory now had the same words before, too."""
    if olds is None or olds[one].memory == olds[other].memory:
        return True
    return torch.equal(words_of(olds[one].local.contiguous()), words_of(olds[other].local.contiguous()))


def _blocks(
    piece: LocalPiece, previous: LocalPiece | None, stage: int | None
) -> tuple[bytes, tuple[int, int]]:
    """A piece's blocks (none for ``stage=None``), and the fingerprint's terms of words that go and come."""
    after, kind = words_of(piece.local.contiguous()), piece.box.kind
    before = None if previous is None else words_of(previous.local.contiguous())
    coded, gone, come = bytearray(), 0, 0
    for start in range(0, after.numel(), BLOCK):
        new, old = after[start : start + BLOCK], None if before is None else before[start : start + BLOCK]
        if old is None:
            places = torch.arange(new.numel())
        else:
            places = changed_words(old, new)
            gone += _terms(piece.box, old, places, start)
        come += _terms(piece.box, new, places, start)
        if stage is not None:
            coded += encode_block(old, new, places, kind, stage)
    return bytes(coded), (gone, come)


def _terms(box: Box, words: Tensor, places: Tensor, start: int) -> int:
    there = places.to(words.device)
    return fingerprint_at(words[there], box.in_whole(there + start), seed=box.seed)
