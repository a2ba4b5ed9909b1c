"""What goes wrong on a network: every rank gets an error with a name, within the timeout, and no wrong
gradient."""

import pytest
import torch
from torch import nn

import distcomp
from distcomp.transports.gloo_p2p import GlooP2P
from tests.attaching.ddp import jobs


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
