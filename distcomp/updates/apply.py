"""From an update and the state before it to the state after it: all of it, or nothing and a sentence.

An update is read twice. The first time nothing is written: what it would change is worked out, and with it
the fingerprint of the state that would come of it. Only where that is the one which the update promises is
it written, the second time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.files.coding import CorruptFile
from distcomp.kernels.words import M64, fingerprint_at
from distcomp.updates.blocks import BLOCK, ByteLike, Cursor, decode_block
from distcomp.updates.encode import ModelOrState
from distcomp.updates.fingerprints import piece_fingerprint, total
from distcomp.updates.pieces import Box, LocalPiece, local_pieces, tensors_of
from distcomp.updates.update import Update
from distcomp.updates.words import moved, words_of

LIMIT_BYTES = 1 << 36
"""What :func:`read_key_frame` may take unless told otherwise: 64 GiB."""
TENSOR_BYTES = 1 << 10
"""What a tensor takes beside its elements, at most: its name, the object."""
MOST_SCATTERED_PARTS = 1 << 13
"""Parts of one tensor that are no runs of it (shards of columns), at most: each is compared with all."""


class WrongBase(DistcompError):
    """An update was given to another state than the one that it changes."""


@dataclass(frozen=True)
class UpdateTarget:
    """A tensor as far as it lies here, what the update says of it, and whether it is written: of names that
    share memory one is."""

    piece: LocalPiece
    sources: tuple[tuple[Box, ByteLike], ...]
    key: bool
    written: bool = True

    def changes(self, words: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Places among this piece's ``words``, and the words that come there; block by block.

        Raises CorruptFile for what no encoder makes.
        """
        for box, blocks in self.sources:
            cursor = Cursor(blocks)
            for start in range(0, box.words, BLOCK):
                count = min(BLOCK, box.words - start)
                change = decode_block(cursor, count, box.kind)
                if change is None or (self.key and change.words is None):
                    if self.key:
                        raise CorruptFile(f"the key frame lacks words of {box.name[:80]}: it was altered")
                    continue
                places = torch.arange(count) if change.places is None else change.places
                inside, here = self._here(box, places + start)
                here = here.to(words.device)
                if change.distance is None:
                    assert change.words is not None
                    come = change.words[inside].to(words.device)
                else:
                    come = moved(words[here], change.distance[inside].to(words.device), box.kind)
                if box.dtype == torch.bool and bool((come > 1).any()):
                    raise CorruptFile(f"{box.name[:80]} gets bools that are neither 0 nor 1: it was altered")
                yield here, come
            if cursor.left:
                raise CorruptFile(f"{box.name[:80]} has more blocks than words in the update: it was altered")

    def _here(self, box: Box, places: Tensor) -> tuple[Tensor, Tensor]:
        if box == self.piece.box:
            return torch.ones_like(places, dtype=torch.bool), places
        return self.piece.box.from_whole(box.in_whole(places))

    def difference(self) -> int:
        """What the update adds to the fingerprint of this piece (of a key frame: all of it)."""
        box, words, sum_ = self.piece.box, words_of(self.piece.local.contiguous()), 0
        for here, come in self.changes(words):
            places = box.in_whole(here)
            sum_ += fingerprint_at(come, places, seed=box.seed)
            if not self.key:
                sum_ -= fingerprint_at(words[here], places, seed=box.seed)
        return sum_ & M64

    def write(self) -> None:
        """Write what the update says into memory."""
        local = self.piece.local
        contiguous = local.contiguous()
        words = words_of(contiguous)
        for here, come in self.changes(words):
            words[here] = come
        if not local.is_contiguous():
            local.copy_(contiguous)


@torch.no_grad()
def apply(model_or_state: ModelOrState, update: Update, *, before: int | None = None) -> int:
    """Turn the state into the update's version, in place, bit for bit; the fingerprint of what it is now.

    A module, or tensors by name, plain or DTensors of any layout: it need not be the trainer's. Where tensors
    are sharded, all ranks of their mesh call it alike (two all-reduces of 24 bytes: the second says that none
    refuses).

    ``before``: the state's fingerprint where the caller has kept it, which saves reading all of it.

    Memory: beside the state and the update, some blocks of 2^18 words, and a copy of the largest tensor that
    is not contiguous; as many bytes as a memory has in which such tensors lie between each other.

    Raises WrongBase where the state is not the one that the update changes, CorruptFile where the update
    holds what no encoder makes, DistcompError where names, dtypes or shapes differ. Nothing was changed then,
    on any rank.
    """
    pieces = local_pieces(tensors_of(model_or_state))
    plan: list[UpdateTarget] = []
    terms: list[tuple[LocalPiece, tuple[int, int]]] = []
    problem: Exception | None = None
    try:
        plan = planned(pieces, update)
        reads = before is None and not update.key
        terms = [(t.piece, (piece_fingerprint(t.piece) if reads else 0, t.difference())) for t in plan]
    except Exception as error:  # of any kind: the other ranks wait for this one
        problem = error
    (found, difference), failed = total(terms, pieces, problem is not None)
    _raise_alike(problem, failed, update.number)
    found = found if before is None else before
    after = (difference if update.key else found + difference) & M64
    # Each rank counts plain tensors for itself, and they may differ: all ranks write, or none.
    refusal = _refusal(update, found, after)
    _raise_alike(refusal, total([], pieces, refusal is not None)[1], update.number)
    for target in plan:
        if target.written:
            target.write()
    return after


def _refusal(update: Update, found: int, after: int) -> DistcompError | None:
    """Why the update is not to be written where it finds one fingerprint and leads to the other."""
    if found != update.before and not update.key:
        return WrongBase(
            f"update {update.number} changes the state of fingerprint {update.before:016x}, and this one is "
            f"{found:016x}; apply the updates between them first, or a key frame"
        )
    if after != update.after:
        return CorruptFile(
            f"update {update.number} promises the state of fingerprint {update.after:016x} and would lead to "
            f"{after:016x}: it was altered; nothing was changed, get it again"
        )
    return None


def _raise_alike(problem: Exception | None, failed: bool, number: int) -> None:
    """This rank's problem, or a sentence where any rank ``failed``."""
    if problem is not None:
        raise problem
    if failed:
        raise DistcompError(f"another rank refused update {number}, and says why; nothing was changed")


def read_key_frame(update: Update, limit_bytes: int = LIMIT_BYTES) -> dict[str, Tensor]:
    """The state dict in a key frame: plain tensors by name, on the CPU.

    Raises DistcompError for a difference, and where the tensors would take more than ``limit_bytes``;
    CorruptFile as :func:`apply`.
    """
    if not update.key:
        raise DistcompError(f"update {update.number} is a difference; apply it to the version before it")
    whole = {piece.box.name: piece.box for piece in update.pieces}
    needed = sum(math.prod(box.shape) * box.dtype.itemsize + TENSOR_BYTES for box in whole.values())
    if needed > limit_bytes:
        raise DistcompError(
            f"the tensors of update {update.number} take {needed} bytes, more than the {limit_bytes} "
            "allowed; raise the limit if you trust who wrote it"
        )
    try:
        state = {name: torch.empty(box.shape, dtype=box.dtype) for name, box in whole.items()}
    except RuntimeError as error:
        raise DistcompError(
            f"{needed} bytes for update {update.number} are not to be had ({error}); free some"
        ) from None
    apply(state, update)
    return state


def planned(pieces: list[LocalPiece], update: Update) -> list[UpdateTarget]:
    """What the update says of each piece. Raises DistcompError where the two are not of one state dict."""
    if update.parts > 1:
        raise DistcompError(
            f"this is part {update.part} of {update.parts} of version {update.number}; merge all of them "
            "first"
        )
    sources: dict[str, list[tuple[Box, ByteLike]]] = {}
    for said in update.pieces:
        blocks = said.blocks if said.alias is None else update.pieces[said.alias].blocks
        sources.setdefault(said.box.name, []).append((said.box, blocks))
    missing = set(sources) ^ {piece.box.name for piece in pieces}
    if missing:
        raise DistcompError(
            f"{min(missing)[:80]} is in the update and not in the state dict, or the other way round; give "
            "apply the same names as encode"
        )
    for piece in pieces:
        _check_sources(piece.box, [box for box, _ in sources[piece.box.name]])
    plan = [UpdateTarget(piece, tuple(sources[piece.box.name]), update.key) for piece in pieces]
    return _each_memory_once(plan)


def _check_sources(box: Box, sources: list[Box]) -> None:
    for source in sources:
        if (source.dtype, source.shape) != (box.dtype, box.shape):
            raise DistcompError(
                f"{box.name[:80]} is {source.shape} of {source.dtype} in the update and {box.shape} of "
                f"{box.dtype} here; give apply a state dict like the trainer's"
            )
    whole = math.prod(box.shape) * box.halves
    if sum(source.words for source in sources) != whole:
        raise CorruptFile(f"the update does not hold all of {box.name[:80]}: a part is missing")
    parts = [source for source in sources if source.words]
    if _any_overlap(parts):
        raise CorruptFile(f"parts of {box.name[:80]} overlap in the update: it was altered")


def _any_overlap(parts: list[Box]) -> bool:
    """Whether an element lies in two of the parts. Raises DistcompError where that takes too long to say."""
    runs = sorted((part.first, part.words) for part in parts if part.first is not None)
    if len(runs) == len(parts):
        return any(first + words > second for (first, words), (second, _) in itertools.pairwise(runs))
    if len(parts) > MOST_SCATTERED_PARTS:
        raise DistcompError(
            f"{parts[0].name[:80]} lies in {len(parts)} parts that are no runs of it in the update, more "
            f"than {MOST_SCATTERED_PARTS}; shard it along its first dimension"
        )
    begins = np.array([part.offsets for part in parts])
    ends = begins + np.array([part.sizes for part in parts])
    return any(
        bool(((begins[i] < ends[:i]) & (begins[:i] < ends[i])).all(axis=1).any()) for i in range(len(parts))
    )


def _each_memory_once(plan: list[UpdateTarget]) -> list[UpdateTarget]:
    """Mark all but one of those that share memory as not to be written.

    Raises DistcompError where they would become different, or share memory in part.
    """
    first: dict[tuple[object, ...], UpdateTarget] = {}
    once: list[UpdateTarget] = []
    for target in plan:
        local = target.piece.local
        if any(size > 1 and stride == 0 for size, stride in zip(local.shape, local.stride(), strict=True)):
            raise DistcompError(f"{target.piece.box.name} is expanded in memory; make it contiguous first")
        known = first.setdefault(target.piece.memory, target) if local.numel() else target
        if known is not target and not _say_the_same(known, target):
            raise DistcompError(
                f"{known.piece.box.name} and {target.piece.box.name} share memory here and become different "
                "in the update; give each a memory of its own"
            )
        once.append(target if known is target else replace(target, written=False))
    _check_overlaps([target.piece for target in once if target.written])
    return once


def _say_the_same(one: UpdateTarget, other: UpdateTarget) -> bool:
    def said(target: UpdateTarget) -> list[tuple[object, ...]]:
        return [(box.offsets, box.sizes, memoryview(blocks)) for box, blocks in target.sources]

    return said(one) == said(other)


def _check_overlaps(pieces: list[LocalPiece]) -> None:
    """Raises DistcompError naming two tensors that share a part of their memory."""
    storages: dict[int, list[LocalPiece]] = {}
    for piece in pieces:
        if piece.local.numel():
            storages.setdefault(piece.local.untyped_storage().data_ptr(), []).append(piece)
    for there in storages.values():
        there.sort(key=_span)
        if any(_span(one)[1] > _span(other)[0] for one, other in itertools.pairwise(there)):
            _check_elements(there)


def _span(piece: LocalPiece) -> tuple[int, int]:
    """From its first byte in memory to behind its last, whatever lies between."""
    local = piece.local
    last = sum((size - 1) * step for size, step in zip(local.shape, local.stride(), strict=True))
    return local.data_ptr(), local.data_ptr() + (last + 1) * local.element_size()


def _check_elements(pieces: list[LocalPiece]) -> None:
    """Of tensors whose spans overlap: columns of a matrix lie between each other and share nothing, a matrix
    and its transpose share all. Takes a byte for each byte from the first to the last of them."""
    origin = _span(pieces[0])[0]
    taken = torch.zeros(max(_span(piece)[1] for piece in pieces) - origin, dtype=torch.bool)
    for number, piece in enumerate(pieces):
        local, size = piece.local, piece.local.element_size()
        steps = (*(step * size for step in local.stride()), 1)
        here = taken.as_strided((*local.shape, size), steps, _span(piece)[0] - origin)
        if bool(here.any()):
            earlier = [other for other in pieces[:number] if _span(other)[1] > _span(piece)[0]]
            raise DistcompError(
                f"{earlier[-1].box.name} and {piece.box.name} share a part of their memory; give each its own"
            )
        here.fill_(True)
