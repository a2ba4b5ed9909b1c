"""What goes wrong on a network: every rank gets an error with a name, within the timeout, and no wrong
gradient."""

import os
import signal

import pytest
import torch
from torch import nn

import distcomp
from distcomp.transports.gloo_p2p import GlooP2P
from tests.attaching.ddp import jobs
from tests.cluster import Cluster, Failure


@pytest.fixture
def doomed():
    """A cluster that the test may break."""
    clusters = []

    def make(size):
        clusters.append(Cluster(size))
        return clusters[-1]

    yield make
    for one in clusters:
        one.close()


def different(rank, size, specs, seeds):
    model = jobs.wrap(jobs.network())
    try:
        distcomp.attach(model, None, specs[rank], seed=seeds[rank], timeout_s=20)
    except distcomp.SettingsMismatch as error:
        return str(error)
    return "not noticed"


def test_different_methods_are_named_on_every_rank(cluster):
    specs = ["qsgd:bits=4", "qsgd:bits=4", "qsgd:bits=8"]
    for sentence in cluster(3).run(different, specs, [0, 0, 0]):
        assert "method is" in sentence
        assert "rank 2" in sentence
        assert "'qsgd' on rank 0 and 'qsgd:bits=8' on rank 2" in sentence


def test_different_seeds_are_named_on_every_rank(cluster):
    for sentence in cluster(2).run(different, ["identity"] * 2, [0, 7]):
        assert "seed is '0' on rank 0 and '7' on rank 1" in sentence


def absent(rank, size):
    model = jobs.wrap(jobs.network())
    if rank == 1:
        return "did not attach"
    try:
        distcomp.attach(model, None, "identity", timeout_s=2)
    except distcomp.PeerLost as error:
        return str(error)
    return "not noticed"


def test_a_rank_that_does_not_attach_is_named(cluster):
    first, _, third = cluster(3).run(absent)
    assert "rank 1 did not attach within 2 s (timeout_s)" in first
    assert "rank 1 did not attach within 2 s" in third


def struck(rank, size, how, victim):
    """The victim stops or dies in the middle of training; the others say what they see."""
    model = jobs.wrap(jobs.network())
    optimizer = jobs.sgd(model)
    distcomp.attach(model, optimizer, "qsgd:bits=4", timeout_s=8)
    jobs.train(model, optimizer, rank, 3)
    if rank == victim:
        os.kill(os.getpid(), how)
    try:
        jobs.train(model, optimizer, rank, 3)
    except (RuntimeError, distcomp.DistcompError) as error:
        first = f"{type(error).__name__}: {error}"
    else:
        return "not noticed", ""
    try:
        optimizer.step()
    except distcomp.PeerLost as error:
        return first, str(error)
    return first, "the step was not refused"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "stopped"])
@pytest.mark.parametrize("victim", [1, 2])
def test_a_lost_rank_is_named(doomed, how, victim):
    cluster = doomed(3)
    results = cluster.results(struck, how, victim, without=victim)
    for rank, result in enumerate(results):
        if rank != victim:
            assert not isinstance(result, Failure), result
            first, typed = result
            assert f"rank {victim}" in first
            assert f"rank {victim}" in typed, typed


def corrupted(rank, size, where):
    """Rank 1 flips one byte of what it sends in step 2. No rank may apply the gradient."""
    model, optimizer, _ = jobs.attached("qsgd:bits=4", rank)
    jobs.train(model, optimizer, rank, 2)
    before = jobs.flat(model).clone()
    original = GlooP2P.start

    def spoil(self, request):
        if hasattr(request, "payload"):
            request.payload.wire[where] ^= 0x40
        return original(self, request)

    if rank == 1:
        GlooP2P.start = spoil
    try:
        x, y = next(jobs.batches(rank, 1, 7))
        optimizer.zero_grad()
        try:
            nn.functional.cross_entropy(model(x), y).backward()
        except (RuntimeError, distcomp.CorruptPayload) as error:
            said = str(error)
        else:
            said = "not noticed"
        try:
            optimizer.step()
        except distcomp.CorruptPayload as error:
            return said, str(error), torch.equal(before, jobs.flat(model))
        return said, "stepped", torch.equal(before, jobs.flat(model))
    finally:
        GlooP2P.start = original


@pytest.mark.parametrize(
    ("where", "what"), [(0, "magic"), (9, "fingerprint"), (17, "length"), (40, "checksum"), (-9, "checksum")]
)
def test_a_corrupted_payload_is_an_error_and_never_a_gradient(cluster, where, what):
    for said, typed, unmoved in cluster(2).run(corrupted, where):
        assert what in said
        assert what in typed
        assert "rank 1" in typed
        assert unmoved


def interrupted(rank, size):
    """A backward that raises half-way on every rank: what follows is refused, not mixed up with the old one's
    buckets."""
    model, optimizer, _ = jobs.attached("qsgd:bits=4", rank)
    jobs.train(model, optimizer, rank, 3)
    fail = {"on": True}

    def raise_once(gradient):
        if fail["on"]:
            raise ValueError("user's own error")
        return gradient

    model.module[0].weight.register_hook(raise_once)
    x, y = next(jobs.batches(rank, 1))
    try:
        nn.functional.cross_entropy(model(x), y).backward()
    except ValueError:
        fail["on"] = False
    try:
        nn.functional.cross_entropy(model(x), y).backward()
    except (RuntimeError, distcomp.DistcompError) as error:
        return str(error)
    return "went on"


def test_a_backward_after_a_broken_one_is_refused(doomed):
    for sentence in doomed(2).results(interrupted):
        assert "prior iteration" in str(sentence) or "did not finish" in str(sentence)
