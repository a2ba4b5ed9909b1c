"""Checkpoints that mean nothing here: one sentence on every rank, and nothing is taken over."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.nn.parallel import DistributedDataParallel

import distcomp
from tests.attaching.ddp import jobs

TIMEOUT_S = 3.0


def part_of(saved):
    (part,) = saved.values()
    return part


def any_leaf(part):
    name = next(iter(part["state"]))
    return part["state"][name], next(iter(part["state"][name]))


def other_steps(rank, saved):
    part_of(saved)["iterations"] += rank


def other_seeds(rank, saved):
    part_of(saved)["seed"] = rank


def nan_on_one(rank, saved):
    if rank == 1:
        leaves, path = any_leaf(part_of(saved))
        leaves[path][0] = float("nan")


def cut_short_on_one(rank, saved):
    if rank == 1:
        leaves, path = any_leaf(part_of(saved))
        leaves[path] = leaves[path][:1]


def another_type(rank, saved):
    leaves, path = any_leaf(part_of(saved))
    leaves[path] = leaves[path].double()


def text_for_a_tensor(rank, saved):
    leaves, path = any_leaf(part_of(saved))
    leaves[path] = "residual"


def renamed(rank, saved):
    state = part_of(saved)["state"]
    state["module.other"] = state.pop(next(iter(state)))


def lacks_a_parameter(rank, saved):
    state = part_of(saved)["state"]
    state.pop(next(iter(state)))


def another_method(rank, saved):
    part_of(saved)["method"] = "topk"


def another_model(rank, saved):
    part_of(saved)["parameters"] = "3 tensors, digest 0"


def text_for_a_number(rank, saved):
    part_of(saved)["iterations"] = "5"


def huge_world(rank, saved):
    part_of(saved).update(world_size=10**9, ranks="0-999999999")


def no_mapping(rank, saved):
    saved.clear()
    saved["rank0"] = None


DAMAGES = {
    other_steps: "iterations is 3 on rank 0 and 4 on rank 1",
    other_seeds: "seed is 0 on rank 0 and 1 on rank 1",
    nan_on_one: "rank 1 cannot load the checkpoint, so no rank does: the checkpoint's 'residual'",
    cut_short_on_one: "has the shape (1,) where",
    another_type: "is of torch.float64 where torch.float32 is due",
    text_for_a_tensor: "holds no tensor under 'residual'",
    renamed: "holds state of 'module.other': parameters were renamed",
    lacks_a_parameter: "holds no state of",
    another_method: "is of another method: 'topk', and here is 'qsgd:bits=1'",
    another_model: "is of another parameter: '3 tensors, digest 0'",
    text_for_a_number: "its iterations is no whole number",
    huge_world: "was saved by 1000000000 ranks",
    no_mapping: "not distcomp's, or of another format",
}


def sentences(rank, size):
    """What every damage is told by, whether the state stayed as it was, and that training goes on."""
    model, optimizer, handle = jobs.attached("qsgd:bits=1", rank)
    told = {}
    with handle:
        jobs.train(model, optimizer, rank, 3)
        good = handle.state_dict()
        jobs.train(model, optimizer, rank, 1, start=3)
        before = handle.state_dict()
        for damage in DAMAGES:
            bad = copy.deepcopy(good)
            damage(rank, bad)
            try:
                handle.load_state_dict(bad)
                told[damage.__name__] = "it was taken"
            except distcomp.DistcompError as error:
                told[damage.__name__] = str(error)
            assert alike(handle.state_dict(), before), damage.__name__
        handle.load_state_dict(good)
        assert alike(handle.state_dict(), good)
        jobs.train(model, optimizer, rank, 1, start=9)
    return told


def alike(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    return one == other


def test_every_rank_says_the_same_sentence_and_takes_nothing_over(cluster):
    first, second = cluster(2).run(sentences)
    assert first == second
    for damage, wanted in DAMAGES.items():
        assert wanted in first[damage.__name__], damage.__name__


def loose(rank, size):
    """Another method's state, told that it is meant: what fits is taken, what does not begins anew."""
    _, _, other = jobs.attached("qsgd:bits=1", rank)
    model, optimizer, handle = jobs.attached("qsgd:bits=1", rank)
    with other, handle:
        jobs.train(model, optimizer, rank, 3)
        saved = handle.state_dict()
        leaves, path = any_leaf(part_of(saved))
        cut = next(iter(part_of(saved)["state"]))
        leaves[path] = leaves[path][:1]
        part_of(saved)["method"] = "topk"
        other.load_state_dict(saved, strict=False)
        loaded = part_of(other.state_dict())
        kept = set(loaded["state"]) ^ set(part_of(saved)["state"])
        return (
            loaded["iterations"],
            kept == {cut},
            alike({**part_of(saved)["state"], cut: None}, {**loaded["state"], cut: None}),
        )


def test_without_strict_what_fits_is_taken(cluster):
    for found in cluster(2).run(loose):
        assert found == (3, True, True)


def alone(rank, size):
    model = jobs.wrap(jobs.network())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = distcomp.attach(model, optimizer, "qsgd:bits=1", timeout_s=TIMEOUT_S)
    told = None
    jobs.train(model, optimizer, rank, 2)
    if rank == 0:
        try:
            handle.load_state_dict(handle.state_dict())
        except distcomp.PeerLost as error:
            told = str(error)
    dist.barrier()
    if rank == 1:  # later than the first has waited
        try:
            handle.load_state_dict(handle.state_dict())
        except distcomp.DistcompError as error:
            told = str(error)
    dist.barrier()
    handle.__exit__(RuntimeError, None, None)
    return told


def test_a_load_on_one_rank_alone_is_named(cluster):
    first, second = cluster(2).run(alone)
    assert first.startswith(f"rank 1 did not load a checkpoint within {TIMEOUT_S:g} s, and rank 0 did")
    assert first in second


def columns(rank, size, path):
    """DDP over the columns of a 2 x 2 mesh, saved in one checkpoint of the whole job."""
    group = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]

    def attached(seed):
        model = DistributedDataParallel(jobs.network(seed), process_group=group)
        return model, distcomp.attach(model, None, "qsgd:bits=1")

    model, handle = attached(rank % 2)
    with handle:
        jobs.train(model, torch.optim.SGD(model.parameters(), 0.1), rank, 3)
        saved = handle.state_dict()
        dcp.save({"distcomp": saved}, checkpoint_id=path)
    _, other = attached(rank % 2)
    with other:
        other.load_checkpoint(path)
        return list(saved), alike(other.state_dict(), saved)


def test_groups_of_a_mesh_save_into_one_checkpoint(cluster, tmp_path):
    found = cluster(4).run(columns, str(tmp_path))
    assert [keys for keys, _ in found] == [[f"rank{rank}"] for rank in range(4)]
    assert all(same for _, same in found)


def averaged(rank, size, spec):
    """What fails is told, and the models stay as they were."""
    model = jobs.wrap(jobs.network())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = distcomp.attach(model, optimizer, spec)
    told = []
    with handle:
        jobs.train(model, optimizer, rank, 5)
        before, weights = handle.state_dict(), jobs.flat(model)
        for change in (
            lambda part: part["tracks"].clear(),
            lambda part: next(iter(part["tracks"].values())).update(last="3"),
            lambda part: next(iter(part["tracks"].values())).update(lands_at=10**6),
            lambda part: part["state"]["0.weight"].update(weights=torch.zeros(3)),
            lambda part: part.update(iterations=part["iterations"] + rank),
        ):
            bad = copy.deepcopy(before)
            change(part_of(bad))
            try:
                handle.load_state_dict(bad)
            except distcomp.DistcompError as error:
                told.append(str(error))
        assert alike(handle.state_dict(), before)
        assert torch.equal(jobs.flat(model), weights)
    return told


@pytest.mark.parametrize("spec", ["local_sgd:period=3", "choco"])
def test_averaged_models_are_looked_at_alike(cluster, spec):
    first, second = cluster(2).run(averaged, spec)
    assert first == second
    wanted = (
        "tracks is damaged",
        "last is no whole number",
        "lands_at",
        "has the shape (3,)",
        "iterations is",
    )
    for sentence, words in zip(first, wanted, strict=True):
        assert words in sentence or ("under way" in sentence and words == "lands_at"), sentence
