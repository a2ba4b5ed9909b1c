"""Save at step k, kill, restart: the trajectory is bit-equal to the uninterrupted one. On another world size
the debt is kept."""

import io

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import distcomp
from distcomp import registry
from tests.attaching.ddp import jobs

SPECS = [name for name, entry in registry.METHODS.items() if entry.kind == "gradient" and not entry.control]
SPECS += ["qsgd:bits=1"]
SPECS += [f"allocate:period={period}" for period in (2, 3, 6)]  # resumed within, after and before a plan


def through_torch_save(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def uninterrupted(rank, size, spec):
    model, optimizer, handle = jobs.attached(spec, rank)
    with handle:
        jobs.train(model, optimizer, rank, 10)
    return jobs.flat(model)


def first_half(rank, size, spec):
    model, optimizer, handle = jobs.attached(spec, rank)
    with handle:
        jobs.train(model, optimizer, rank, 5)
        return through_torch_save(
            {
                "model": model.module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "distcomp": handle.state_dict(),
            }
        )


def second_half(rank, size, spec, saved):
    model = jobs.wrap(jobs.network(seed=99))
    optimizer = jobs.sgd(model, spec)
    model.module.load_state_dict(saved[rank]["model"])
    optimizer.load_state_dict(saved[rank]["optimizer"])
    with distcomp.attach(model, optimizer, spec) as handle:
        handle.load_state_dict(saved[rank]["distcomp"])
        jobs.train(model, optimizer, rank, 5, start=5)
        return jobs.flat(model), handle.stats()["iterations"]


@pytest.mark.parametrize("spec", SPECS)
def test_resume_is_bit_equal(cluster, spec):
    whole = cluster(2).run(uninterrupted, spec)
    saved = cluster(2).run(first_half, spec)
    for expected, (resumed, iterations) in zip(whole, cluster(2).run(second_half, spec, saved), strict=True):
        assert torch.equal(expected, resumed)
        assert iterations == 10


def through_dcp(rank, size, spec, path):
    model, optimizer, handle = jobs.attached(spec, rank)
    with handle:
        jobs.train(model, optimizer, rank, 5)
        dcp.save({"distcomp": handle.state_dict()}, checkpoint_id=path)
        saved = handle.state_dict()
    other = jobs.wrap(jobs.network())
    with distcomp.attach(other, jobs.sgd(other), spec) as handle:
        jobs.train(other, jobs.sgd(other), rank, 1, start=77)
        handle.load_checkpoint(path)
        loaded = handle.state_dict()
    mine, theirs = saved[f"rank{rank}"], loaded[f"rank{rank}"]
    equal = all(
        torch.equal(value, theirs["state"][name][leaf])
        for name, leaves in mine["state"].items()
        for leaf, value in leaves.items()
    )
    return equal, mine["iterations"] == theirs["iterations"], len(mine["state"])


def test_distributed_checkpoint_keeps_every_ranks_own_state(cluster, tmp_path):
    for equal, same_clock, count in cluster(2).run(through_dcp, "qsgd:bits=1", str(tmp_path)):
        assert equal
        assert same_clock
        assert count > 0


def debts(rank, size, path):
    model, optimizer, handle = jobs.attached("qsgd:bits=1", rank)
    with handle:
        jobs.train(model, optimizer, rank, 3)
        dcp.save({"distcomp": handle.state_dict()}, checkpoint_id=path)
        return through_torch_save(handle.state_dict())


def inherit(rank, size, saved, path):
    """Both ways in: a list of all ranks' state dicts, and a distributed checkpoint."""
    found = []
    for load in (lambda h: h.load_state_dict(saved), lambda h: h.load_checkpoint(path)):
        model, optimizer, handle = jobs.attached("qsgd:bits=1", rank)
        with handle:
            load(handle)
            jobs.train(model, optimizer, rank, 1, start=50)  # it also runs on
            load(handle)
            found.append(handle.state_dict()[f"rank{rank}"]["state"])
    return found


@pytest.mark.parametrize("size", [1, 3])
def test_another_world_size_keeps_the_mean_of_the_residuals(cluster, size, tmp_path):
    saved = cluster(2).run(debts, str(tmp_path))
    path = "residual"
    for rank, ways in enumerate(cluster(size).run(inherit, saved, str(tmp_path))):
        for state in ways:
            for name, leaves in state.items():
                old = [one[f"rank{r}"]["state"][name][path] for r, one in enumerate(saved)]
                assert torch.equal(leaves[path], torch.stack(old).mean(0)), (rank, name)


def part_of_another_world(size):
    about = {"method": "qsgd:bits=1", "parameters": "6 tensors", "iterations": 1, "seed": 0, "state": {}}
    return {"format": 2, "world_size": size, "ranks": f"0-{size - 1}", **about}


def wrong_checkpoints(rank, size):
    _, _, handle = jobs.attached("qsgd:bits=1", rank)
    sentences = []
    with handle:
        other_world = {"rank0": part_of_another_world(5)}
        for saved in ({}, {"model": 3}, {"rank0": {"format": 99}}, other_world):
            try:
                handle.load_state_dict(saved)
            except distcomp.DistcompError as error:
                sentences.append(str(error))
        dist.barrier()
    return sentences


def test_wrong_checkpoints_are_refused(cluster):
    for empty, foreign, version, partial in cluster(2).run(wrong_checkpoints):
        assert "no state of any rank" in empty
        assert "not distcomp's" in foreign
        assert "another format" in version
        assert "ranks [1, 2, 3, 4] are missing" in partial
