"""What memory, tables and words an update may not have: refused in a sentence, or served exactly."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import ClassVar

import pytest
import torch

from distcomp import DistcompError, updates
from distcomp.updates import update as container
from distcomp.updates.apply import _check_sources
from distcomp.updates.pieces import Box
from distcomp.updates.update import UpdatePiece
from tests.updates.states import same


def test_a_matrix_and_its_transpose_in_one_memory_are_refused():
    memory = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    kept, changed = memory.clone(), memory.clone()
    changed[0, 0] *= 1.5
    update = updates.encode({"a": kept, "b": kept.t()}, {"a": changed, "b": changed.t()})
    with pytest.raises(DistcompError, match="a and b share a part of their memory; give each its own"):
        updates.apply({"a": memory, "b": memory.t()}, update)
    assert memory.equal(kept)


def test_columns_that_lie_between_each_other_are_served():
    """Their spans overlap and no element does: halves of a fused projection."""
    memory = torch.zeros(6, 8)
    old = {"a": torch.zeros(6, 3), "b": torch.zeros(6, 5)}
    new = {name: torch.full_like(tensor, 2.0 + len(name)) for name, tensor in old.items()}
    state = {"a": memory[:, :3], "b": memory[:, 3:]}
    updates.apply(state, updates.encode(old, new))
    assert same(state, new)
    with pytest.raises(DistcompError, match="share a part of their memory"):
        updates.apply({"a": memory[:, :3], "b": memory[:, 2:7]}, updates.encode(None, new))


def bools(word: int) -> updates.Update:
    """A key frame of three bools, stored as this word."""
    raw = {"m": torch.full((3,), word, dtype=torch.uint8)}
    words = updates.encode(None, raw, entropy="none").pieces[0].blocks
    box = Box("m", torch.bool, (3,), (0,), (3,))
    after = updates.state_fingerprint({"m": raw["m"].view(torch.bool)})
    return updates.Update(1, True, 0, after, (UpdatePiece(box, words),))


def test_bools_are_0_or_1():
    state = {"m": torch.zeros(3, dtype=torch.bool)}
    updates.apply(state, bools(1))
    assert state["m"].all()
    with pytest.raises(updates.CorruptFile, match="m gets bools that are neither 0 nor 1"):
        updates.apply(state, bools(2))
    assert state["m"].view(torch.uint8).tolist() == [1, 1, 1]


@pytest.mark.parametrize("lazily", [torch.Tensor.conj, lambda tensor: tensor.conj().imag])
def test_lazily_conjugated_tensors_are_refused(lazily):
    tensor = lazily(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(DistcompError, match="w is conjugated or negated lazily"):
        updates.encode(None, {"w": tensor})
    updates.encode(None, {"w": tensor.resolve_conj().resolve_neg()})


# --- tables ---


def test_a_table_of_empty_pieces_is_refused(monkeypatch):
    monkeypatch.setattr(container, "MOST_EMPTY_PIECES", 100, raising=False)
    empty = Box("e", torch.float32, (0,), (0,), (0,))
    full = UpdatePiece(Box("w", torch.uint8, (3,), (0,), (3,)), b"abc")

    def of(count: int) -> bytes:
        pieces = (full, *(UpdatePiece(empty, b"") for _ in range(count)))
        return updates.Update(1, True, 0, 0, pieces).to_bytes()

    assert len(updates.read_update(of(102)).pieces) == 103
    with pytest.raises(updates.CorruptFile, match="more tensors than it has blocks for"):
        updates.read_update(of(103))


def test_an_empty_tensor_of_an_impossible_shape_is_refused():
    shape = (0, 1 << 69)
    piece = UpdatePiece(Box("w", torch.float32, shape, (0, 0), shape), b"")
    with pytest.raises(DistcompError, match="w has an impossible shape"):
        updates.read_key_frame(updates.read_update(updates.Update(1, True, 0, 0, (piece,)).to_bytes()))


class CountedBox(Box):
    """Counts how often somebody looks at where a box lies."""

    looks: ClassVar[Counter[str]] = Counter()

    def __getattribute__(self, name: str) -> object:
        if name in ("offsets", "sizes"):
            CountedBox.looks[name] += 1
        return super().__getattribute__(name)


@pytest.mark.parametrize("by_columns", [False, True])
def test_the_parts_of_a_tensor_are_each_looked_at_a_few_times(by_columns):
    count = 300
    offsets = [(0, at) if by_columns else (at, 0) for at in range(count)]
    shape, size = ((2, count), (2, 1)) if by_columns else ((count, 2), (1, 2))
    parts = [CountedBox("w", torch.uint8, shape, at, size) for at in offsets]
    CountedBox.looks.clear()
    _check_sources(Box("w", torch.uint8, shape, (0, 0), shape), parts)
    assert max(CountedBox.looks.values()) < 30 * count
    parts[7] = parts[8]
    with pytest.raises(updates.CorruptFile, match="parts of w overlap"):
        _check_sources(Box("w", torch.uint8, shape, (0, 0), shape), parts)


def test_too_many_scattered_parts_are_refused():
    count = 8193
    shape = (2, count)
    parts = [Box("w", torch.uint8, shape, (0, at), (2, 1)) for at in range(count)]
    parts[1] = dataclasses.replace(parts[0])
    with pytest.raises(DistcompError, match="w lies in 8193 parts that are no runs of it"):
        _check_sources(Box("w", torch.uint8, shape, (0, 0), shape), parts)
