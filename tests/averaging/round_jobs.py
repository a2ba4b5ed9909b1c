"""Workers that die, come late and join while others train: what each does in the tests."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, TCPStore

import distcomp
from tests.averaging.model_jobs import flat, network, sgd, train
from tests.cluster import PATIENCE_S, threads_left

PERIOD = 4


class Place:
    """A store on rank 0 that outlives all, and a process group of the founders, or a world of one's own."""

    def __init__(self, rank: int, founders: int) -> None:
        common = dist.group.WORLD.get_group_store()
        self.rank = rank
        self._host = None
        if rank == 0:
            self._host = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            common.set("port", str(self._host.port))
        self.port = int(common.get("port"))
        dist.barrier()
        dist.destroy_process_group()
        self.store = PrefixStore("test", TCPStore("127.0.0.1", self.port, wait_for_workers=False))
        if rank < founders:
            store = PrefixStore("founders", TCPStore("127.0.0.1", self.port, wait_for_workers=False))
            dist.init_process_group("gloo", store=store, rank=rank, world_size=founders)
        else:
            dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def leave(self, workers: int) -> None:
        """The store's host is the last to go."""
        begin_s = time.monotonic()
        self.store.add("left", 1)
        while self.rank == 0 and self.store.add("left", 0) < workers:
            assert time.monotonic() - begin_s < PATIENCE_S
            threading.Event().wait(0.05)


class Worker:
    """A model in training, and what became of it in each outer step."""

    def __init__(self, rank: int, spec: Any, **options: Any) -> None:
        self.rank = rank
        self.model = network(rank)
        self.optimizer = sgd(self.model)
        self.handle = distcomp.attach(self.model, self.optimizer, spec, timeout_s=20.0, **options)
        self.steps = 0
        self.anchors: dict[int, str] = {}

    @property
    def fragment(self) -> Any:
        return self.handle._sync._fragments[0]

    @property
    def iterations(self) -> int:
        return self.handle.stats()["iterations"]

    def step(self) -> None:
        train(self.model, self.optimizer, self.rank, 1, start=self.steps)
        self.steps += 1
        self.handle.state_dict()  # makes the exchange of this step now
        self.anchors[self.fragment.exchanges] = digest(self.common)

    def waits(self, grace_s: float) -> None:
        """From now on a round waits so long for who has not come."""
        self.handle._sync._rounds.grace_s = grace_s

    @property
    def common(self) -> list[Tensor]:
        """Anchors and the outer optimizer's state."""
        states = [fragment.state for fragment in self.handle._sync._fragments]
        return [leaf.data for state in states for leaf in (state["anchor"], *state["outer"].values())]

    def found(self) -> dict[str, Any]:
        stats = self.handle.stats()
        self.handle.detach()
        return {
            "anchors": self.anchors,
            "rounds": stats["rounds"],
            "exchanges": self.fragment.exchanges,
            "iterations": stats["iterations"],
            "steps": self.steps,
            "workers": stats["workers"],
            "lost": stats.get("lost", []),
            "end": flat(self.model),
            "threads": threads_left(),
        }


def digest(tensors: list[Tensor]) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def killed_and_joined(rank: int, size: int, spec: Any, dies: int, at: int) -> dict[str, Any]:
    """Worker ``dies`` is killed in its step ``at``; the last rank joins when the others have gone on, and all
    train on together."""
    founders = size - 1
    place = Place(rank, founders)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if rank == founders:
            place.store.wait(["went on"])
            worker = Worker(rank, spec, join=place.address)
            place.store.set("last", str(worker.iterations + 10 * PERIOD))
        else:
            worker = Worker(rank, spec)
        last = None
        while last is None or worker.iterations < last:
            if (rank, worker.steps) == (dies, at):
                os.kill(os.getpid(), signal.SIGKILL)
            worker.step()
            if rank == 0 and worker.iterations == at + 2 * PERIOD:
                place.store.set("went on", "yes")
            if place.store.check(["last"]):
                last = int(place.store.get("last"))
        found = worker.found()
    found["said"] = [str(one.message) for one in caught if "training goes on" in str(one.message)]
    place.leave(founders)
    return found


def late(rank: int, size: int, spec: Any, misses: int, grace_s: float) -> dict[str, Any]:
    """The last rank comes to its second outer round when the others have held ``misses`` without it.

    They hold these with a window of ``grace_s`` and then stand still until it has caught up, so that what
    comes next does not hang on how fast a rank is.
    """
    place, late = Place(rank, size), size - 1
    worker = Worker(rank, spec)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2 * PERIOD - 1):
            worker.step()
        found: dict[str, Any] = {}
        if rank == late:
            worker.model.zero_grad()
            place.store.wait([f"held by {other}" for other in range(late)])
            train(worker.model, worker.optimizer, rank, 1, start=worker.steps)
            found["own"], found["old"] = _weights(worker), worker.common[0].clone()
            worker.handle.state_dict()
            found["own now"], found["anchor"] = _weights(worker), worker.common[0].clone()
            place.store.set("caught up", "yes")
        else:
            worker.waits(grace_s)
            while worker.handle.stats()["rounds"] < 1 + misses:
                worker.step()
            worker.waits(60.0)
            place.store.set(f"held by {rank}", "yes")
            place.store.wait(["caught up"])
        while worker.iterations < (4 + misses) * PERIOD:
            worker.step()
        found |= worker.found()
    found["said"] = [str(one.message) for one in caught if "worker" in str(one.message)]
    place.leave(size)
    return found


def _weights(worker: Worker) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in worker.model.parameters()])


def too_few(rank: int, size: int, spec: Any, timeout_s: float) -> str:
    """All but ranks 0 and 1 are killed; what the two are told."""
    place = Place(rank, size)
    model = network(rank)
    optimizer = sgd(model)
    handle = distcomp.attach(model, optimizer, spec, timeout_s=timeout_s)
    told = "nothing"
    try:
        for index in range(3 * PERIOD):
            if rank > 1 and index == PERIOD + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            train(model, optimizer, rank, 1, start=index)
        handle.state_dict()
    except distcomp.DistcompError as error:
        told = f"{type(error).__name__}: {error}"
    place.leave(2)
    return told


def weighed(rank: int, size: int, spec: Any) -> dict[str, Any]:
    """One outer step after which each has seen another number of samples."""
    place = Place(rank, size)
    worker = Worker(rank, spec)
    before = worker.common[0].clone()
    for index in range(PERIOD):
        worker.handle.saw(float(1 + rank * 3))
        train(worker.model, worker.optimizer, rank, 1, start=index)
    own = _weights(worker)
    worker.handle.state_dict()
    after = worker.common[0].clone()
    worker.handle.detach()
    place.leave(size)
    return {"before": before, "own": own, "after": after}


def refused_to_join(rank: int, size: int) -> str:
    """The last rank joins with another method than the first one's."""
    place = Place(rank, size - 1)
    spec = "local_sgd:period=4,on_failure=continue"
    told = "nothing"
    if rank < size - 1:
        worker = Worker(rank, spec)
        place.store.wait(["told"])
        worker.handle.detach()
    else:
        try:
            Worker(rank, "local_sgd:period=5,on_failure=continue", join=place.address)
        except distcomp.DistcompError as error:
            told = f"{type(error).__name__}: {error}"
        place.store.set("told", "yes")
    place.leave(size)
    return told
