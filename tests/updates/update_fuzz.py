"""Hostile updates: what the fuzzer and the tests feed to who reads and applies them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from distcomp import DistcompError, updates
from distcomp.updates.update import UPDATE_HEADER, UpdatePiece
from tests.updates.states import bits_of, copied, same, stepped

LIMIT_BYTES = 1 << 24
"""What a key frame may take."""


def base() -> dict[str, Tensor]:
    return {
        "w": bits_of((40, 30), torch.bfloat16, 0), "b": bits_of((30,), torch.float32, 1),
        "q": bits_of((65,), torch.int8, 2), "e": torch.empty(0, 3), "s": bits_of((), torch.float64, 3),
    }  # fmt: skip


def good() -> list[updates.Update]:
    old = base()
    new = {name: stepped(tensor, 0.2, 9, 300) for name, tensor in old.items()}
    few = {name: stepped(tensor, 0.01, 9) for name, tensor in old.items()}
    made = [updates.encode(old, new, entropy=entropy) for entropy in ("none", "zlib")]
    return [
        *made,
        updates.encode(old, few, entropy="none"),
        updates.encode(None, new),
        updates.encode(None, few, entropy="none"),
    ]


def cases(count: int, seed: int) -> Iterator[tuple[bytes]]:
    """Good updates with bytes replaced, cut, doubled or moved; two in three with their checksum mended, so
    that what is inside is read; noise behind a good header; tables of other shapes; blocks of others."""
    draw, updates_ = random.Random(seed), good()
    raws = [update.to_bytes() for update in updates_]
    for number in range(count):
        kind = number % 6
        if kind < 3:
            data = _edited(bytearray(draw.choice(raws)), draw)
            yield (_mended(data) if kind else bytes(data),)
        elif kind == 3:
            yield (_blocks_edited(draw.choice(updates_), draw),)
        elif kind == 4:
            yield (_table_edited(draw.choice(updates_), draw),)
        else:
            head = bytearray(draw.choice(raws)[: draw.choice([0, 4, 52, 68, 90])])
            yield (_mended(head + draw.randbytes(draw.randrange(200))),)


def _edited(data: bytearray, draw: random.Random) -> bytearray:
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) or 1)
        end = min(len(data), at + draw.choice([1, 1, 2, 8, 40]))
        what = draw.randrange(5)
        if what < 2 and data:
            data[at:end] = draw.randbytes(end - at)
        elif what == 2 and data:
            data[at] = draw.choice([0, 1, 2, 127, 128, 255])
        elif what == 3:
            del data[at:end]
        else:
            data[at:at] = data[at:end]
    return data


def _mended(data: bytearray) -> bytes:
    """With lengths that add up, where there is a header, and the checksum that belongs to it."""

    size = UPDATE_HEADER.size
    if len(data) < size:
        return bytes(data)
    fields = list(UPDATE_HEADER.unpack(data[:size]))
    fields[9] = min(fields[9], len(data) - size)
    fields[11] = len(data) - size - fields[9]
    bare = UPDATE_HEADER.pack(*fields)[:-16]
    check = hashlib.blake2b(bare + data[size:], digest_size=16).digest()
    return bare + check + bytes(data[size:])


def _blocks_edited(update: updates.Update, draw: random.Random) -> bytes:
    at = draw.randrange(len(update.pieces))
    blocks = bytes(_edited(bytearray(update.pieces[at].blocks), draw))
    pieces = list(update.pieces)
    pieces[at] = UpdatePiece(pieces[at].box, blocks)
    after = draw.choice([update.after, draw.getrandbits(64)])
    return replace(update, pieces=tuple(pieces), after=after, _head=[]).to_bytes()


def _table_edited(update: updates.Update, draw: random.Random) -> bytes:
    """Names, shapes, offsets, dtypes and aliases of others, in a table that is well written."""
    pieces = list(update.pieces)
    at, other = draw.randrange(len(pieces)), draw.randrange(len(pieces))
    box, sizes = pieces[at].box, [0, 1, 3, 40, 1 << 20, 1 << 31, 1 << 40, 1 << 62]
    what = draw.randrange(6)
    if what == 0:
        box = replace(box, name=pieces[other].box.name)
    elif what == 1:
        box = replace(box, dtype=pieces[other].box.dtype)
    elif what == 2:
        shape = tuple(draw.choice(sizes) for _ in range(draw.randrange(4)))
        box = replace(box, shape=shape, sizes=shape, offsets=(0,) * len(shape))
    elif what == 3 and box.shape:
        box = replace(box, offsets=tuple(draw.choice([0, 1, 20, 1 << 40]) for _ in box.shape), sizes=tuple(
            draw.choice([0, 1, 10, length]) for length in box.shape
        ))  # fmt: skip
    elif what == 4:
        pieces = [*pieces, pieces[other]] if draw.random() < 0.5 else pieces[:-1]
        at = min(at, len(pieces) - 1)
        box = pieces[at].box
    pieces[at] = UpdatePiece(box, pieces[other].blocks if what == 5 else pieces[at].blocks, pieces[at].alias)
    return replace(update, pieces=tuple(pieces), _head=[]).to_bytes()


def try_to_apply(data: bytes) -> str:
    """``applied`` (to the state that it promises) or ``refused`` in a sentence; then nothing has changed."""
    state = base()
    try:
        update = updates.read_update(data)
        after = updates.apply(state, update)
    except DistcompError as error:
        sentence = str(error)
    else:
        sentence = ""
    if sentence:
        assert len(sentence.split()) > 4
        assert same(state, _BASE), "a refused update changed something"
        outcome = "refused"
    else:
        assert after == update.after == updates.state_fingerprint(state)
        outcome = "applied"
        if update.key:
            assert same(updates.read_key_frame(update, LIMIT_BYTES), state)
    try:
        update = updates.read_update(data)
        if update.key:
            updates.read_key_frame(update, LIMIT_BYTES)
    except DistcompError:
        pass
    return outcome


_BASE = copied(base())
