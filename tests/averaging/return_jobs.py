"""A rank that is slow, given up, and comes back: what the ranks do in the tests."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

import distcomp
from distcomp.averaging.gossip import Gossip
from tests.averaging.model_jobs import flat, start, train
from tests.cluster import threads_left

LATE = 2
"""The rank that is given up."""


def returning(rank: int, size: int, spec: Any, timeout_s: float) -> dict[str, Any]:
    """What each rank ends with, where the late one was given up and came back."""
    dist.barrier()  # a busy machine starts ranks at times that are further apart than timeout_s
    model, optimizer, handle = start("plain", spec, rank, timeout_s=timeout_s)
    found = trained_together(rank, handle, lambda index: train(model, optimizer, rank, 1, start=index))
    handle.state_dict()  # makes the exchange of the last step now
    found["own"] = flat(model)
    found["replicas"], found["public"] = copies_of(handle)
    with handle.averaged_model():
        found["mean"] = flat(model)
    found["left out"] = handle.stats().get("lost", [])
    handle.detach()
    return {**found, "end": flat(model), "threads": threads_left()}


def trained_together(rank: int, handle: distcomp.Handle, step: Callable[[int], None]) -> dict[str, Any]:
    """The late rank does nothing until its neighbours have given it up; then all train on together, until
    every edge is open again and for twelve steps more."""
    store = dist.group.WORLD.get_group_store()
    lost: list[int] = []
    last, steps = None, 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        while last is None or handle.stats()["iterations"] < last:
            if (rank, steps) == (LATE, 3):
                store.wait(["given up"])
            step(steps)
            steps += 1
            now = handle.stats().get("lost", [])
            if now and not lost:
                store.set("given up", "yes")
            lost = lost or now
            if rank == LATE and steps > 4 and not now and last is None:
                store.set("last", str(handle.stats()["iterations"] + 12))
            if last is None and store.check(["last"]):
                last = int(store.get("last"))
    said = [str(one.message) for one in caught if "rank" in str(one.message)]
    return {"lost": lost, "said": said, "steps": steps, "iterations": handle.stats()["iterations"]}


def copies_of(handle: distcomp.Handle) -> tuple[dict[int, Tensor], Tensor | None]:
    """The replicas of the neighbours' models, and what they have a replica of."""
    (fragment,) = handle._sync._fragments
    gossip, state = fragment.averaging, fragment.state
    assert isinstance(gossip, Gossip)
    public = gossip.public(state)
    return {int(j): model.data for j, model in state.get("replicas", {}).items()}, (
        None if public is None else public.data
    )
