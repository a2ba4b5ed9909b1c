"""A trainer sharded by FSDP2, and receivers of any other layout."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from distcomp import DistcompError, updates
from distcomp.updates.pieces import Box
from tests.updates.states import copied, same, stepped


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 12), nn.Linear(12, 5), nn.BatchNorm1d(5)).bfloat16()


def whole_versions():
    old = {name: tensor.clone() for name, tensor in net().state_dict().items()}
    return old, {name: stepped(tensor, 0.3, 1, 5) for name, tensor in old.items()}


def sharded(state, mesh, placements):
    """As DTensors, the buffers apart, which FSDP2 leaves plain."""
    from torch.distributed.tensor import distribute_tensor

    return {
        name: tensor.clone()
        if tensor.dim() == 0 or "running" in name
        else distribute_tensor(tensor, mesh, placements)
        for name, tensor in state.items()
    }


def exchanged(own):
    """Every rank's part, merged."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own.to_bytes())
    return updates.merge_parts([updates.read_update(part) for part in parts])


def full(state):
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in state.items()}


def layouts(rank, size):
    """From FSDP2's shards to plain tensors, to another dimension, to replicas of shards, and back."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard

    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    old, new = whole_versions()
    model = net()
    fully_shard(model, mesh=line)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in model.state_dict().items():
        tensor.copy_(sharded({name: new[name]}, line, [Shard(0)])[name])
    found = {}
    update = exchanged(updates.encode(before, model))
    found["fingerprint"] = updates.state_fingerprint(model) == updates.state_fingerprint(new) == update.after
    receivers = {
        "plain": copied(old),
        "shards": sharded(old, line, [Shard(0)]),
        "replicas": sharded(old, square, [Replicate(), Shard(0)]),
    }
    for name, state in receivers.items():
        updates.apply(state, update)
        found[name] = same(full(state), new)
    matrices = {name: tensor for name, tensor in old.items() if tensor.dim() == 2}
    changed = {name: new[name] for name in matrices}
    for name, mesh, placements in [
        ("grid", square, [Shard(0), Shard(1)]),
        ("columns", line, [Shard(1)]),
        ("replicated columns", square, [Replicate(), Shard(1)]),
    ]:
        state = sharded(matrices, mesh, placements)
        part = updates.encode(state, sharded(changed, mesh, placements))
        both = exchanged(part)
        plain, other = copied(matrices), sharded(matrices, line, [Shard(0)])
        updates.apply(plain, both)
        updates.apply(other, both)
        updates.apply(state, both)
        found[name] = same(plain, changed) and same(full(other), changed) and same(full(state), changed)
    key = exchanged(updates.encode(None, sharded(changed, square, [Shard(0), Shard(1)])))
    found["key frame"] = same(updates.read_key_frame(key), changed)
    return found


def test_any_layout_to_any_other(cluster):
    for found in cluster(4).run(layouts):
        assert found == dict.fromkeys(found, True)
        assert len(found) == 8


def one_is_given_bad_bytes(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh("cpu", (2,))
    old, new = {"w": torch.arange(12.0).view(4, 3)}, {"w": torch.arange(12.0).view(4, 3) + 1}
    state = sharded(old, mesh, [Shard(0)])
    update = updates.encode(old, new)
    wrong = updates.encode({"v": old["w"]}, {"v": new["w"]})
    try:
        updates.apply(state, wrong if rank else update)
    except DistcompError as error:
        return str(error), same(full(state), old)


def test_where_one_rank_refuses_no_rank_writes(cluster):
    (one, kept), (other, also_kept) = cluster(2).run(one_is_given_bad_bytes)
    assert "another rank refused update 1" in one
    assert "v is in the update and not in the state dict, or the other way round" in other
    assert kept
    assert also_kept


def plain_ones_differ(rank, size):
    """A plain tensor beside the shards, which somebody has changed on rank 1 alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh("cpu", (2,))
    old = {"w": torch.arange(12.0).view(4, 3), "running": torch.zeros(3)}
    new = {name: tensor + 1 for name, tensor in old.items()}
    state = sharded(old, mesh, [Shard(0)])
    state["running"] += 5 * rank
    try:
        updates.apply(state, updates.encode(old, new))
    except DistcompError as error:
        return (
            type(error).__name__,
            str(error),
            same(full(state), old | {"running": torch.zeros(3) + 5 * rank}),
        )


def test_where_plain_tensors_differ_on_one_rank_no_rank_writes(cluster):
    (_, one, kept), (kind, other, also_kept) = cluster(2).run(plain_ones_differ)
    assert "another rank refused update 1" in one
    assert kind == "WrongBase"
    assert "apply the updates between them first" in other
    assert kept
    assert also_kept


def one_runs_out_of_memory(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    from distcomp.updates.apply import UpdateTarget

    mesh = init_device_mesh("cpu", (2,))
    old = {"w": torch.arange(12.0).view(4, 3)}
    state = sharded(old, mesh, [Shard(0)])

    def fails(target):
        raise MemoryError("no more")

    with pytest.MonkeyPatch.context() as patch:
        if rank:
            patch.setattr(UpdateTarget, "difference", fails)
        try:
            updates.apply(state, updates.encode(old, {"w": old["w"] + 1}))
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def test_an_error_of_any_kind_is_told_to_the_other_ranks(cluster):
    one, other = cluster(2).run(one_runs_out_of_memory)
    assert "another rank refused update 1" in one
    assert other == "MemoryError: no more"


def caught_up(rank, size, directory):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    old = {"w": torch.arange(12.0).view(4, 3)}
    state = sharded(old, init_device_mesh("cpu", (2,)), [Shard(0)])
    try:
        updates.UpdateDirectory(directory).catch_up(updates.Receiver(state))
    except DistcompError as error:
        return str(error), same(full(state), old)


def test_a_sharded_receiver_of_a_directory_is_told_of_the_group(cluster, tmp_path):
    old = {"w": torch.arange(12.0).view(4, 3)}
    updates.UpdateDirectory(tmp_path).write([updates.encode(old, {"w": old["w"] + 1})])
    for told, kept in cluster(2).run(caught_up, str(tmp_path)):
        assert "use receive_from_group" in told
        assert kept


def rounded_shards(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    one, other = (
        distribute_tensor(value, mesh, [Shard(0)]) for value in (torch.ones(4, 4), torch.zeros(4, 4))
    )
    rounded = updates.floating_as({"a": one, "b": other, "tied": one}, torch.bfloat16)
    kept = same(
        full(rounded),
        {
            "a": torch.ones(4, 4).bfloat16(),
            "b": torch.zeros(4, 4).bfloat16(),
            "tied": torch.ones(4, 4).bfloat16(),
        },
    )
    return kept, rounded["tied"] is rounded["a"], rounded["b"] is rounded["a"]


def test_shards_are_rounded_each_and_tied_ones_once(cluster):
    assert cluster(2).run(rounded_shards) == [(True, True, False)] * 2


def streamed(rank, size, last):
    """A publisher over two shards, a receiver over the two others."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard

    from distcomp import calls

    meshes = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])]
    start = {"w": torch.arange(35.0).view(7, 5)}

    def there(number, mesh):
        return sharded({"w": start["w"] + number}, mesh, [Shard(0)])

    if rank < 2:
        publisher = updates.Publisher(there(0, meshes[0]), key_every=3)
        for number in range(1, last + 1):
            updates.publish_to_group(publisher, there(number, meshes[0]))
        calls.disconnect()
        return True
    state = there(0, meshes[1])
    receiver = updates.Receiver(state)
    for number in range(1, last + 1):
        updates.receive_from_group(receiver)
        receiver.check()
        if not same(full(state), {"w": start["w"] + number}):
            return f"version {number} is wrong"
    calls.disconnect()
    return True


def test_a_stream_from_shards_to_shards(cluster):
    assert cluster(4).run(streamed, 4) == [True] * 4


def test_parts_belong_together():
    old, new = {"w": torch.zeros(4)}, {"w": torch.ones(4)}
    update = updates.encode(old, new)
    assert updates.merge_parts([update]) == update
    half = updates.Update(1, False, 0, 0, (), 0, 2)
    for wrong in ([], [half], [half, half]):
        with pytest.raises(DistcompError, match="are not those of one version"):
            updates.merge_parts(wrong)
    with pytest.raises(DistcompError, match="version 1 and of version 2"):
        updates.merge_parts([half, updates.Update(2, False, 0, 0, (), 1, 2)])
    with pytest.raises(DistcompError, match="merge all of them first"):
        updates.apply(old, half)


@pytest.mark.parametrize(
    ("offsets", "sizes"), [((1, 0, 2), (2, 4, 3)), ((0, 0, 0), (3, 4, 6)), ((2, 1, 0), (1, 2, 6))]
)
def test_coordinates_of_a_box(offsets, sizes):
    box = Box("w", torch.float32, (3, 4, 6), offsets, sizes)
    whole = torch.arange(72).view(3, 4, 6)
    cut = whole[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))]
    assert box.in_whole(torch.arange(cut.numel())).equal(cut.reshape(-1))
    inside, here = box.from_whole(torch.arange(72))
    assert inside.nonzero().view(-1).equal(cut.reshape(-1))
    assert here.equal(torch.arange(cut.numel()))
    contiguous = torch.arange(72)[cut.reshape(-1)].diff().eq(1).all()
    assert (box.first is not None) == bool(contiguous)
