"""Every way in which a backward, a rank, a store or a script can stop short: each wait ends, each survivor
names the same rank and why, and the model can be left.

That waits are bounded is told by the cluster, whose patience is far below the 30 minutes of a process group.
"""

import contextlib
import copy
import gc
import io
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.nn.parallel import DistributedDataParallel

import distcomp
from distcomp.transports.verdict import REMEDY
from tests.attaching.ddp import jobs
from tests.cluster import Cluster, Failure, threads_left

TIMEOUT_S = 6
PATIENCE_S = 90


class Layers(nn.Module):
    """Six layers, one of which can be left out, and a norm with running statistics."""

    def __init__(self, norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(16, 48), nn.Linear(48, 5)
        self.middle = nn.ModuleList(nn.Linear(48, 48) for _ in range(4))
        self.norm = nn.BatchNorm1d(48) if norm else nn.Identity()
        self.skip = self.fail = False

    def forward(self, x):
        if self.fail:
            raise ValueError("the forward's own")
        x = self.norm(self.first(x))
        for index, layer in enumerate(self.middle):
            x = x if self.skip and index == 1 else torch.tanh(layer(x))
        return self.last(x)


class Rank:
    """One rank of a way: a model of many buckets, attached, and what then happens to it."""

    def __init__(self, rank, size, *, method="qsgd:bits=4", plain=False, norm=False, **options):
        self.rank, self.size = rank, size
        module = Layers(norm)
        self.model = module if plain else DistributedDataParallel(module, bucket_cap_mb=0.004, **options)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
        self.handle = distcomp.attach(self.model, self.optimizer, method, timeout_s=TIMEOUT_S)
        self.train(2)

    @property
    def module(self):
        return getattr(self.model, "module", self.model)

    def train(self, steps=3):
        for x, y in jobs.batches(self.rank, steps):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()

    def wait_for_note(self):
        """Be slow, until the others have given up."""
        heartbeat = self.handle._session._heartbeat
        while not heartbeat._ask().notes:
            threading.Event().wait(0.1)
        raise ValueError("was slow")


def victim_of(way, size):
    return {"first": 0, "middle": size // 2, "last": size - 1}[way.rpartition(" ")[2]]


def raise_in_backward(one, error):
    def fail(_):
        raise error("the backward's own")

    one.module.middle[1].weight.register_hook(fail)
    one.train()


def skips(one, victim):
    one.module.skip = one.rank == victim
    one.train()


def slow(one, victim):
    one.wait_for_note() if one.rank == victim else one.train(12)


def strike(how):
    def act(one, victim):
        if one.rank == victim:
            os.kill(os.getpid(), how)
        one.train(12)

    return act


def by_victim(act):
    """The victim does what stops it; the others train on."""
    return lambda one, victim: act(one) if one.rank == victim else one.train(12)


def ends(one):
    one.handle.detach()
    raise ValueError("had no more data")


def fails_in_forward(one):
    one.module.fail = True
    one.train()


def fails_between(one):
    raise ValueError("between two steps")


def fails_inside_with(one):
    with one.handle:
        raise ValueError("inside with")


def talks_alone(one):
    one.handle.exchange(torch.ones(3))


def accumulates(one):
    with one.handle.no_sync():
        one.train(1)
    one.wait_for_note()


def destroys(one):
    dist.destroy_process_group()
    one.train()


def exits(one):
    os._exit(3)


BEHIND = "did not come to an exchange within timeout_s=6"
GONE = "died or hangs"
SHORT = "detached before the backward had ended"
ENDED = "ended or detached while others still exchange"

WAYS = {  # what is attached, what then happens, and why the victim is said not to come
    "skips a layer, last": ({}, skips, "without a gradient for 2 of 12 parameters"),
    "skips a layer, first": ({}, skips, "without a gradient for 2 of 12 parameters"),
    "backward raises, last": ({}, by_victim(lambda one: raise_in_backward(one, ValueError)), SHORT),
    "backward interrupted, first": (
        {}, by_victim(lambda one: raise_in_backward(one, KeyboardInterrupt)), SHORT),
    "forward raises, last": ({}, by_victim(fails_in_forward), ENDED),
    "raises between, first": ({}, by_victim(fails_between), ENDED),
    "raises inside with, last": ({}, by_victim(fails_inside_with), "ValueError: inside with"),
    "has no more data, last": ({}, by_victim(ends), ENDED),
    "has no more data, first": ({}, by_victim(ends), ENDED),
    "slow, last": ({}, slow, BEHIND),
    "slow, first": ({}, slow, BEHIND),
    "slow with topk, last": ({"method": "topk"}, slow, BEHIND),
    "slow with powersgd, first": ({"method": "powersgd:min_compression=0"}, slow, BEHIND),
    "slow with ddp, last": ({"method": "ddp"}, slow, BEHIND),
    "slow with torch:powersgd, first": ({"method": "torch:powersgd"}, slow, BEHIND),
    "slow with norms and torch:fp16, last": ({"norm": True, "method": "torch:fp16"}, slow, BEHIND),
    "slow with norms, last": ({"norm": True}, slow, BEHIND),
    "slow with unused, first": ({"find_unused_parameters": True}, slow, BEHIND),
    "slow under averaging, last": ({"plain": True, "method": "local_sgd:period=2"}, slow, BEHIND),
    "slow under gossip, first": ({"plain": True, "method": "choco"}, slow, BEHIND),
    "exchanges alone, last": ({}, by_victim(talks_alone), BEHIND),
    "accumulates, first": ({}, by_victim(accumulates), BEHIND),
}  # fmt: skip

ENDS = {  # ways after which the process is gone, or stopped for good
    "dead, last": ({}, strike(signal.SIGKILL), GONE),
    "dead, first": ({}, strike(signal.SIGKILL), GONE),
    "exits, first": ({}, by_victim(exits), GONE),
    "stopped, middle": ({}, strike(signal.SIGSTOP), GONE),
    "stopped, first": ({}, strike(signal.SIGSTOP), GONE),
    "stopped with norms, first": ({"norm": True}, strike(signal.SIGSTOP), GONE),
    "stopped under averaging, first": (
        {"plain": True, "method": "local_sgd:period=2"}, strike(signal.SIGSTOP), GONE),
}  # fmt: skip


def go(rank, size, way):
    """A rank is attached, and then the way is gone."""
    return stop_short(Rank(rank, size, **(WAYS | ENDS)[way][0]), way)


def stop_short(one, way):
    """What this rank is told, of which type, and which threads are left after leaving."""
    told = kind = ""
    try:
        (WAYS | ENDS)[way][1](one, victim_of(way, one.size))
    except BaseException as error:
        told, kind = str(error), type(error).__name__
    try:
        one.handle.detach()
    except distcomp.DistcompError as error:  # what went wrong is said again; the model is left all the same
        told = told or str(error)
    return told, kind, threads_left()


def check(answers, victim, reason):
    """Every survivor names the victim and why, in the same words, as a PeerLost, and has left."""
    sentences = set()
    for rank, answer in enumerate(answers):
        if rank == victim:
            continue
        assert not isinstance(answer, Failure), (rank, answer)
        told, kind, threads = answer
        assert f"rank {victim}" in told, (rank, told)
        assert reason in told, (rank, told)
        assert kind == "PeerLost"
        assert threads == []
        sentences.add(told.split(f"; {REMEDY}")[0])
    assert len(sentences) == 1, sentences


@pytest.fixture(scope="module")
def reused():
    """Clusters that are used again while all of their ranks answer."""
    made = {}

    def get(size):
        if size not in made or not made[size].usable:
            made[size] = Cluster(size, PATIENCE_S)
        return made[size]

    yield get
    for one in made.values():
        one.close()


AT_ONCE = 4
"""So many ways are under way at once, each among two and among three ranks: what they do is wait."""


@pytest.fixture(scope="module")
def answers_of(request):
    """``answers_of(way)``: those of two ranks and those of three. The ways tested next run meanwhile."""
    here = [item for item in request.session.items if item.path == request.path]
    ahead = [item.callspec.params["way"] for item in here if "way" in item.fixturenames]
    free, under_way = {2: [], 3: []}, {}

    def answers(way, size):
        cluster = free[size].pop() if free[size] else Cluster(size, PATIENCE_S)
        try:
            return cluster.results(go, way, without=victim_of(way, size) if way in ENDS else None)
        finally:
            if way in ENDS or not cluster.usable:
                cluster.close()
            else:
                free[size].append(cluster)

    with ThreadPoolExecutor(2 * AT_ONCE) as pool:

        def get(way):
            at = ahead.index(way)
            for one in ahead[at : at + AT_ONCE]:
                if one not in under_way:
                    under_way[one] = [pool.submit(answers, one, size) for size in (2, 3)]
            return [each.result() for each in under_way[way]]

        yield get
    for cluster in free[2] + free[3]:
        cluster.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_stops_short_is_named(answers_of, way):
    for answers in answers_of(way):
        victim = victim_of(way, len(answers))
        check(answers, victim, WAYS[way][2])
        assert not isinstance(answers[victim], Failure), answers[victim]
        assert answers[victim][2] == []


@pytest.mark.parametrize("way", ENDS)
def test_a_rank_that_is_no_more_is_named(answers_of, way):
    for answers in answers_of(way):
        check(answers, victim_of(way, len(answers)), ENDS[way][2])


def attach(rank, size, how):
    """Attach; one rank differs. What each is told, and whether any thread of ours is left."""
    odd = rank == size - 1
    options = {}
    if how == "find_unused_parameters":
        options["find_unused_parameters"] = odd
    if how == "static_graph":
        options["static_graph"] = odd
    module = Layers()
    module.middle[0].weight.requires_grad_(not (how == "requires_grad" and odd))
    plain = how in ("requires_grad", "absent", "stopped")
    model = module if plain else DistributedDataParallel(module, bucket_cap_mb=0.004, **options)
    method = "local_sgd" if plain else "qsgd:bits=4"
    if odd and how in ("method", "refused"):
        method = {"method": "topk", "refused": "qsgd:bits=99"}[how]
    if odd and how == "absent":
        return "was not there", []
    if rank == 0 and how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if rank == 0 and how == "dead in between":
        sys.modules["distcomp.attaching.session"].Heartbeat = lambda *_, **__: os.kill(
            os.getpid(), signal.SIGKILL
        )
    try:
        distcomp.attach(model, None, method, seed=int(how == "seed" and odd), timeout_s=TIMEOUT_S)
    except distcomp.DistcompError as error:
        # Not the thread that asks a stopped store for ever: torch cannot be told to give up.
        return str(error), [name for name in threads_left() if name != "distcomp-bounded"]
    return "attached", []


DIFFERENCES = {
    "method": "method is 'qsgd' on rank 0 and 'topk' on rank {odd}",
    "seed": "seed is '0' on rank 0 and '1' on rank {odd}",
    "find_unused_parameters": "find_unused_parameters is 'False' on rank 0 and 'True' on rank {odd}",
    "static_graph": "static_graph is 'False' on rank 0 and 'True' on rank {odd}",
    "requires_grad": "one of the parameters is 'middle.0.weight (48, 48) torch.float32, requires_grad=True' "
    "on rank 0 and 'middle.0.weight (48, 48) torch.float32, requires_grad=False' on rank {odd}",
    "refused": "bits",
}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("how", DIFFERENCES)
def test_a_difference_is_said_by_every_rank(reused, how, size):
    answers = reused(size).results(attach, how)
    for told, threads in answers:
        assert DIFFERENCES[how].format(odd=size - 1) in told
        assert how != "refused" or told.endswith(
            answers[-1][0].removeprefix(f"rank {size - 1} was refused: ")
        )
        assert threads == []


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_that_is_not_there_is_named(reused, size):
    for told, _ in reused(size).results(attach, "absent")[:-1]:
        assert f"rank {size - 1} did not attach within 6 s" in told


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("how", ["stopped", "dead in between"])
def test_the_stores_host_may_be_lost_while_attaching(how, size):
    cluster = Cluster(size, PATIENCE_S)
    try:
        for answer in cluster.results(attach, how, without=0)[1:]:
            assert not isinstance(answer, Failure), answer
            assert "rank 0" in answer[0]
            assert answer[1] == []
    finally:
        cluster.close()


def trials(rank, size, spec, count):
    """What a process holds after ``count`` models were attached and left, after the first as a measure."""
    plain = not isinstance(spec, str)

    def trial():
        model = jobs.network() if plain else jobs.wrap(jobs.network())
        optimizer = jobs.sgd(model)
        with distcomp.attach(model, optimizer, spec) as handle:
            jobs.train(model, optimizer, rank, 1)
            copied, saved = copy.deepcopy(model), io.BytesIO()
            torch.save(model, saved)
            assert torch.equal(jobs.flat(copied), jobs.flat(model))
            getattr(copied, "module", copied)(torch.ones(2, 16)).sum().backward()
            assert handle.stats()["iterations"] == 1

    def held():
        gc.collect()
        groups = len(dist.distributed_c10d._world.pg_map)
        return threading.active_count(), len(os.listdir("/proc/self/fd")), tasks(), groups

    def tasks():
        return len(os.listdir("/proc/self/task"))

    trial()
    before = held()
    for _ in range(count):
        trial()
    for _ in range(500):  # a thread of Python's that has ended is a task of the system's a little longer
        if tasks() <= before[2]:
            break
        threading.Event().wait(0.01)
    return before, held()


@pytest.mark.parametrize(
    ("spec", "count"),
    [("qsgd:bits=4", 50), ("local_sgd:period=1", 10),
     (distcomp.choco(on_failure="continue"), 10), ("ddp", 10)],
    ids=["gradients", "models", "neighbours", "builtin"],
)  # fmt: skip
def test_models_that_were_left_leave_nothing(cluster, spec, count):
    for before, after in cluster(2).run(trials, spec, count):
        assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)


def saves_alone(rank, size):
    """Rank 0 alone asks for the state of an averaged model: what it is told."""
    module = Layers()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    handle = distcomp.attach(module, optimizer, "local_sgd:period=1", timeout_s=TIMEOUT_S)
    x, y = next(jobs.batches(rank, 1))
    nn.functional.cross_entropy(module(x), y).backward()
    optimizer.step()
    store, told = dist.group.WORLD.get_group_store(), ""
    if rank == 0:
        try:
            handle.state_dict()
        except distcomp.PeerLost as error:
            told = str(error)
        store.set("asked", "yes")
    store.wait(["asked"])
    handle._leave(agree=False)
    return told


def test_a_state_that_one_rank_asks_for_alone_says_what_to_do():
    cluster = Cluster(2, PATIENCE_S)
    try:
        told, _ = cluster.run(saves_alone)
    finally:
        cluster.close()
    assert "state_dict() first makes the exchange that the last iteration left to be made" in told
    assert "call it on every rank, and then save where you like" in told


def connections():
    """The connections of this process to the rendezvous store, by their ports here."""
    inodes = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(f"/proc/self/fd/{name}"))
    port, found = f":{int(os.environ['MASTER_PORT']):04X}", set()
    for table in ("tcp", "tcp6"):
        with open(f"/proc/self/net/{table}") as lines:
            fields = [line.split() for line in lines][1:]
        found |= {one[1] for one in fields if one[2].endswith(port) and f"socket:[{one[9]}]" in inodes}
    return found


def attached_twice(rank, size):
    """The connections to the store with one attached model, and with two."""
    found, handles = [], []
    for _ in range(2):
        handles.append(distcomp.attach(jobs.wrap(jobs.network()), None, "qsgd:bits=4"))
        found.append(connections())
    for handle in handles:
        handle.detach()
    return found


def test_all_models_of_a_group_share_one_connection_to_the_store(cluster):
    """Its host looks up the name of each that connects, and answers nobody meanwhile."""
    for first, second in cluster(2).run(attached_twice):
        assert first == second
        assert first


def refused(rank, size, how):
    """What is told by that which cannot be served."""
    module = Layers()
    model = DistributedDataParallel(module, bucket_cap_mb=0.004)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    if how == "steps in backward":
        _apply_optimizer_in_backward(torch.optim.SGD, module.parameters(), {"lr": 0.1})
    if how == "complex":
        module.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    try:
        method = "qsgd" if how in ("steps in backward", "destroyed") else "local_sgd:period=1"
        handle = distcomp.attach(model, optimizer, method, timeout_s=TIMEOUT_S)
        x, y = next(jobs.batches(rank, 1))
        if how == "replaced":
            module.last.weight = nn.Parameter(module.last.weight.detach().clone())
        if how == "destroyed":
            dist.destroy_process_group()
            assert handle.state_dict()
            handle.exchange(torch.ones(2))
        with model.join() if how == "join" else contextlib.nullcontext():
            for _ in range(2):
                nn.functional.cross_entropy(model(x), y).backward()
    except distcomp.DistcompError as error:
        return str(error)
    return "went on"


@pytest.mark.parametrize(
    ("how", "sentence"),
    [("steps in backward", "an optimizer steps on first.weight within the backward"),
     ("complex", "phase is complex"), ("join", "do not join()"),
     ("replaced", "since the model was attached (last.weight)"),
     ("destroyed", "the process group was destroyed while a method was attached")],
)  # fmt: skip
def test_what_cannot_be_served_is_said(how, sentence):
    cluster = Cluster(2, PATIENCE_S)
    try:
        for told in cluster.results(refused, how):
            assert sentence in str(told)
    finally:
        cluster.close()
