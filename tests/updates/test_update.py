"""An update turns one state into the other, bit for bit, or changes nothing and says why."""

from __future__ import annotations

import sys
import tracemalloc
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distcomp import DistcompError, updates
from distcomp.updates import blocks
from distcomp.updates.apply import _any_overlap
from distcomp.updates.update import DTYPE_NAMES, UpdatePiece
from tests.updates import oracle
from tests.updates.states import DTYPES, SHAPES, bits_of, copied, raw, same, stepped, words


def mixed(seed=0):
    """A state of every dtype and shape."""
    return {
        f"{dtype}.{number}": bits_of(shape, dtype, seed + number)
        for dtype in DTYPES
        for number, shape in enumerate(SHAPES)
    }


@pytest.mark.parametrize("entropy", ["none", "zlib", "zstd"])
def test_every_dtype_and_shape_comes_back_bit_for_bit(entropy):
    if entropy == "zstd":
        pytest.importorskip("zstandard")
    old, new = mixed(), {name: stepped(tensor, 0.3, 1, 40) for name, tensor in mixed().items()}
    update = updates.read_update(updates.encode(old, new, entropy=entropy).to_bytes())
    state = copied(old)
    assert updates.apply(state, update) == updates.state_fingerprint(new) == update.after
    assert same(state, new)
    whole = updates.read_update(updates.encode(None, new, entropy=entropy).to_bytes())
    assert same(updates.read_key_frame(whole), new)
    assert updates.apply(state, whole) == update.after
    assert same(state, new)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from(SHAPES),
    st.floats(0, 1),
    st.integers(1, 2000),
    st.integers(0, 99),
)
def test_the_bytes_say_what_the_oracle_reads(dtype, shape, share, furthest, seed):
    old = {"a.weight": bits_of(shape, dtype, seed), "a.bias": bits_of((5,), torch.bfloat16, seed)}
    new = {
        "a.weight": stepped(old["a.weight"], share, seed, furthest),
        "a.bias": stepped(old["a.bias"], 0.5, seed),
    }
    before = {
        name: (words(t), t.element_size() // (1 + t.is_complex()), t.is_floating_point() or t.is_complex())
        for name, t in old.items()
    }
    for update in (updates.encode(old, new), updates.encode(None, new)):
        read = oracle.apply(update.to_bytes(), before, dict(enumerate(DTYPE_NAMES)))
        assert read == {name: words(tensor) for name, tensor in new.items()}


def test_a_word_that_moves_by_one_unit_costs_its_index_and_a_bit():
    generator = torch.Generator().manual_seed(0)
    old = {"w": torch.randn(1 << 20, generator=generator).bfloat16()}
    for share in (0.004, 0.0115, 0.0327):
        update = updates.encode(old, {"w": stepped(old["w"], share, 1)})
        changed = share * (1 << 20)
        entropy = -(share * torch.tensor(share).log2() + (1 - share) * torch.tensor(1 - share).log2()) * (
            1 << 20
        )
        # Elias-Fano's indices are within half a bit of the entropy of random ones
        assert 8 * (update.nbytes - 150) < float(entropy) + 1.6 * changed


def test_blocks_follow_one_another(monkeypatch):
    for module in ("encode", "apply", "fingerprints"):
        monkeypatch.setattr(sys.modules[f"distcomp.updates.{module}"], "BLOCK", 64)
    old, new = mixed(), {name: stepped(tensor, 0.1, 1, 3) for name, tensor in mixed().items()}
    state = copied(old)
    updates.apply(state, updates.read_update(updates.encode(old, new).to_bytes()))
    assert same(state, new)
    assert same(updates.read_key_frame(updates.encode(None, new)), new)


def test_nothing_changed_costs_the_table():
    state = {f"layers.{i}.weight": torch.randn(100, 100) for i in range(20)}
    assert updates.encode(state, copied(state)).nbytes < 68 + 20 * 12


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
        self.out.weight = self.embedding.weight


def test_tied_weights_are_sent_once_and_written_once():
    torch.manual_seed(0)
    trainer, sampler = Tied(), Tied()
    sampler.load_state_dict(trainer.state_dict())
    old = copied(trainer.state_dict())  # a copy ties nothing
    trainer.embedding.weight.data += 1e-3
    update = updates.encode(old, trainer)
    alone = updates.encode({"w": old["out.weight"]}, {"w": trainer.out.weight})
    assert [piece.alias for piece in update.pieces] == [None, 0]
    assert update.nbytes < alone.nbytes + 60
    for state in (sampler, old):  # tied there, and not
        updates.apply(state, updates.read_update(update.to_bytes()))
        assert same(updates.read_key_frame(updates.encode(None, state)), dict(trainer.state_dict()))
    assert sampler.out.weight is sampler.embedding.weight


def test_names_tied_here_that_become_different_are_refused():
    old = {"a": torch.zeros(9), "b": torch.zeros(9)}
    update = updates.encode(old, {"a": torch.ones(9), "b": torch.zeros(9)})
    shared = torch.zeros(9)
    with pytest.raises(DistcompError, match="a and b share memory"):
        updates.apply({"a": shared, "b": shared}, update)
    memory = torch.zeros(12)
    with pytest.raises(DistcompError, match="share a part of their memory"):
        updates.apply({"a": memory[:9], "b": memory[3:]}, update)
    assert not shared.any()


def test_names_tied_since_are_sent_each():
    old = {"a": torch.zeros(9), "b": torch.ones(9)}
    shared = torch.full((9,), 2.0)
    update = updates.encode(old, {"a": shared, "b": shared})
    state = copied(old)
    updates.apply(state, update)
    assert state["a"].equal(shared)
    assert state["b"].equal(shared)


def test_strided_tensors_are_read_and_written():
    old, new = torch.arange(24.0).view(4, 6), torch.arange(24.0).view(4, 6) * 2
    update = updates.encode({"w": old.t()}, {"w": new.t()})
    memory = torch.arange(24.0).view(4, 6).clone()
    updates.apply({"w": memory.t()}, update)
    assert memory.equal(new)


def test_a_module_and_its_state_dict_are_the_same_thing():
    torch.manual_seed(0)
    trainer = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    sampler = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    sampler.load_state_dict(trainer.state_dict())
    old = copied(trainer.state_dict())
    trainer(torch.randn(8, 4)).sum().backward()
    torch.optim.SGD(trainer.parameters(), 0.1).step()
    updates.apply(sampler, updates.encode(old, trainer))
    assert same(dict(sampler.state_dict()), dict(trainer.state_dict()))


# --- what is refused ---


def refused(state, update, match, error=DistcompError):
    kept = copied(state)
    with pytest.raises(error, match=match):
        updates.apply(state, update)
    assert same(state, kept)


def test_another_base_is_refused():
    old, new = {"w": torch.zeros(9)}, {"w": torch.ones(9)}
    update = updates.encode(old, new)
    refused(new, update, "apply the updates between them", updates.WrongBase)
    refused({"w": torch.full((9,), -0.0)}, update, "key frame", updates.WrongBase)


def test_other_names_dtypes_and_shapes_are_named():
    old, new = {"w": torch.zeros(9)}, {"w": torch.ones(9)}
    update = updates.encode(old, new)
    refused(
        {"w": torch.zeros(9), "v": torch.zeros(1)}, update, "v is in the update and not in the state dict, or"
    )
    refused({"w": torch.zeros(8)}, update, r"w is \(9,\) of torch.float32 in the update and \(8,\)")
    refused({"w": torch.zeros(9).half()}, update, "torch.float16 here")
    with pytest.raises(DistcompError, match="v is in one version"):
        updates.encode(old, {**new, "v": torch.zeros(1)})
    with pytest.raises(DistcompError, match=r"w was \(9,\) of torch.float32 and is \(8,\)"):
        updates.encode(old, {"w": torch.zeros(8)})
    with pytest.raises(DistcompError, match="v of the state dict is no dense tensor but a dict"):
        updates.encode(None, {"v": {}})
    with pytest.raises(DistcompError, match="entropy='lzma' is no stage"):
        updates.encode(None, new, entropy="lzma")


def test_every_altered_byte_is_found():
    old = {"w": torch.zeros(40), "b": torch.zeros(3)}
    data = updates.encode(old, {"w": torch.ones(40), "b": torch.zeros(3)}).to_bytes()
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 16
        with pytest.raises(DistcompError):
            updates.apply(copied(old), updates.read_update(bytes(damaged)))
    for end in range(len(data)):
        with pytest.raises(updates.CorruptFile):
            updates.read_update(data[:end])


def test_blocks_that_no_encoder_makes_change_nothing():
    """A checksum mended by who altered it: then what would come of it is not what it promises."""
    generator = torch.Generator().manual_seed(0)
    old = {"w": torch.randn(4096, generator=generator).bfloat16()}
    update = updates.encode(old, {"w": stepped(old["w"], 0.05, 1, 3)}, entropy="none")
    (piece,) = update.pieces
    for at in range(0, len(piece.blocks), 3):
        altered = bytearray(piece.blocks)
        altered[at] ^= 1
        bad = updates.Update(1, False, update.before, update.after, (UpdatePiece(piece.box, bytes(altered)),))
        refused(copied(old), updates.read_update(bad.to_bytes()), "update|altered")


def test_a_key_frame_may_take_no_more_than_is_allowed():
    whole = updates.encode(None, {"w": torch.zeros(1000)})
    with pytest.raises(DistcompError, match="raise the limit if you trust"):
        updates.read_key_frame(whole, limit_bytes=2000)
    with pytest.raises(DistcompError, match="update 1 is a difference"):
        updates.read_key_frame(updates.encode({"w": torch.zeros(3)}, {"w": torch.ones(3)}))


def test_a_small_stream_that_expands_without_end_is_not_expanded():
    bomb = blocks.leb128(1) + blocks._compacted(bytes(1 << 24), blocks.ZLIB)
    tracemalloc.start()
    with pytest.raises(updates.CorruptFile, match="other than 40 bytes"):
        blocks.decode_block(blocks.Cursor(bomb), 10, blocks.WordType(4, True))
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most_bytes < 1 << 20


def test_a_number_without_an_end_and_an_index_that_comes_twice_are_refused():
    with pytest.raises(updates.CorruptFile, match="longer than 64 bits"):
        blocks.Cursor(b"\x80" * 100 + b"\x01").number()
    twice = memoryview(blocks._indices(torch.tensor([3, 3]), 100))
    with pytest.raises(updates.CorruptFile, match="do not rise"):
        blocks._rising(twice, 100, 2)


@pytest.mark.parametrize("distance", [1, 2, 257, 258, 65537, 65538, 2**31 - 1])
def test_a_distance_at_the_edge_of_a_width_comes_back(distance):
    old = {"w": torch.zeros(64, dtype=torch.int32)}
    new = {"w": old["w"].clone().index_fill_(0, torch.tensor([5]), distance)}
    state = copied(old)
    updates.apply(state, updates.read_update(updates.encode(old, new).to_bytes()))
    assert same(state, new)


@pytest.mark.parametrize(("second", "overlap"), [(4, True), (5, False), (6, False)])
def test_parts_that_share_one_word_overlap(second, overlap):
    parts = [SimpleNamespace(first=second, words=5), SimpleNamespace(first=0, words=5)]
    assert _any_overlap(parts) == overlap


def test_more_blocks_than_words_are_refused():
    old = {"w": torch.zeros(64)}
    update = updates.encode(old, {"w": old["w"] + torch.arange(64) % 2})
    (piece,) = update.pieces
    longer = updates.Update(
        1, False, update.before, update.after, (UpdatePiece(piece.box, bytes(piece.blocks) + b"\0"),)
    )
    refused(copied(old), updates.read_update(longer.to_bytes()), "more blocks than words")


def test_zstd_names_its_extra_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DistcompError, match=r"pip install 'distcomp\[zstd\]'"):
        updates.encode(None, {"w": torch.zeros(3)}, entropy="zstd")


# --- safetensors ---


def test_safetensors_are_those_of_the_library(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    state = {name: tensor for name, tensor in mixed().items() if not tensor.is_complex()}
    updates.save_safetensors(state, tmp_path / "model.safetensors")
    read = library.load_file(tmp_path / "model.safetensors")
    assert {name: raw(tensor) for name, tensor in read.items()} == {n: raw(t) for n, t in state.items()}
    assert all(
        read[name].dtype == state[name].dtype and read[name].shape == state[name].shape for name in state
    )
    with pytest.raises(DistcompError, match=r"c is a Tensor of torch.complex64"):
        updates.save_safetensors({"c": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "x")
