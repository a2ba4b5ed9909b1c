"""A backward that stops short: every wait ends, every rank hears why, and the model can be left."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distcomp
from tests.attaching.ddp import jobs
from tests.cluster import Failure, threads_left

TIMEOUT_S = 8


class Skips(nn.Module):
    """Three layers, the middle one of which can be left out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(16, 48), nn.Linear(48, 48), nn.Linear(48, 5)
        self.skips = ()

    def forward(self, x):
        x = torch.tanh(self.first(x)) if "first" not in self.skips else x.repeat(1, 3)
        x = torch.tanh(self.middle(x)) if "middle" not in self.skips else x
        return self.last(x)


def skipping(rank, size, spec, who, cap_mb, skips):
    """Train; from step 3 on, ``who`` leave a layer out. What each is told, and whether it could leave."""
    model = DistributedDataParallel(Skips(), bucket_cap_mb=cap_mb)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = distcomp.attach(model, optimizer, spec, timeout_s=TIMEOUT_S)
    told = "not noticed"
    try:
        for step, (x, y) in enumerate(jobs.batches(rank, 6)):
            model.module.skips = skips if step >= 3 and rank in who else ()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    except (RuntimeError, distcomp.DistcompError) as error:
        told = f"step {step}: {error}"
    handle.detach()
    return told, threads_left()


@pytest.mark.parametrize(
    ("size", "who", "spec"),
    [(2, (0, 1), "qsgd:bits=4"), (3, (0, 1, 2), "powersgd:min_compression=0"), (2, (1,), "topk"),
     (3, (2,), "qsgd:bits=4")],
)  # fmt: skip
def test_a_layer_without_gradients_is_named_on_every_rank(doomed, size, who, spec):
    for told, threads in doomed(size).results(skipping, spec, who, 0.004, ("middle",)):
        assert "step 3: " in told
        assert "without a gradient for 2 of 6 parameters (middle.bias, middle.weight)" in told
        assert "find_unused_parameters=True" in told
        assert threads == []


def test_a_model_of_one_bucket_is_named_too(doomed):
    for told, threads in doomed(2).results(skipping, "qsgd:bits=4", (0, 1), 25, ("first",)):
        assert "step 3: " in told
        assert "without a gradient for 2 of 6 parameters (first.bias, first.weight)" in told
        assert threads == []


def broken(rank, size, error, within):
    """A backward that raises half-way, on every rank."""
    model, optimizer, handle = jobs.attached("qsgd:bits=4", rank)
    jobs.train(model, optimizer, rank, 3)

    def fail(_):
        raise error("the user's own")

    model.module[0].weight.register_hook(fail)
    x, y = next(jobs.batches(rank, 1))
    loss = nn.functional.cross_entropy(model(x), y)
    caught = ""
    try:
        if within:
            with handle:
                loss.backward()
        else:
            loss.backward()
    except error as raised:
        caught = str(raised)
    handle.detach()
    return caught, threads_left()


@pytest.mark.parametrize("within", [True, False], ids=["with", "detach"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_a_backward_raises_leaves_the_model_free(doomed, error, within):
    for caught, threads in doomed(2).results(broken, error, within):
        assert caught == "the user's own"
        assert threads == []


def asked(rank, size, request_sizes):
    """Weights after training, with ``stats()`` asked for in every backward, early and late."""
    model, optimizer, handle = jobs.attached("qsgd:bits=4", rank)
    iterations = []
    with handle:
        if request_sizes:
            for parameter in model.module.parameters():
                parameter.register_hook(lambda _: iterations.append(handle.stats()["iterations"]))
        jobs.train(model, optimizer, rank, 4)
        return jobs.flat(model), iterations


def test_stats_may_be_asked_for_within_a_backward(cluster):
    without = cluster(2).run(asked, False)
    for (weights, iterations), (expected, _) in zip(cluster(2).run(asked, True), without, strict=True):
        assert torch.equal(weights, expected)
        assert len(iterations) == 4 * len(list(jobs.network().parameters()))
        assert set(iterations) == {0, 1, 2, 3}


def not_short(rank, size, how):
    """What looks like a backward that stopped short, and is none."""
    model = DistributedDataParallel(Skips(), bucket_cap_mb=0.004, find_unused_parameters=how == "unused")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with distcomp.attach(model, optimizer, "qsgd:bits=4", timeout_s=TIMEOUT_S) as handle:
        for step, (x, y) in enumerate(jobs.batches(rank, 4)):
            model.module.skips = ("middle",) if how == "unused" and step % 2 else ()
            optimizer.zero_grad()
            if how == "accumulated":
                with handle.no_sync():
                    model(x).sum().backward()
                optimizer.zero_grad()
            if how == "adversarial":
                x.requires_grad_(True)
                (towards,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), x)
                x = (x + 0.1 * towards.sign()).detach()
            nn.functional.cross_entropy(model(x), y).backward()
            if how == "looked at":
                x.requires_grad_(True)
                torch.autograd.grad(model(x).sum(), x)
            optimizer.step()
        return handle.stats()["iterations"]


@pytest.mark.parametrize("how", ["unused", "accumulated", "adversarial", "looked at"])
def test_what_is_not_short_goes_on(cluster, how):
    assert cluster(2).run(not_short, how) == [4, 4]


def skips_reductions(rank, size):
    module = jobs.network()
    model = DistributedDataParallel(module, find_unused_parameters=True, skip_all_reduce_unused_params=True)
    try:
        distcomp.attach(model, None, "identity")
    except distcomp.DistcompError as error:
        return str(error)
    return "not refused"


def test_buckets_that_ddp_skips_are_refused(cluster):
    for sentence in cluster(2).run(skips_reductions):
        assert "skip_all_reduce_unused_params" in sentence


def leaves_early(rank, size):
    """Rank 1 detaches while rank 0 still trains."""
    model, optimizer, handle = jobs.attached("qsgd:bits=4", rank)
    handle.detach()
    model = jobs.wrap(jobs.network())
    optimizer = jobs.sgd(model)
    handle = distcomp.attach(model, optimizer, "qsgd:bits=4", timeout_s=TIMEOUT_S)
    jobs.train(model, optimizer, rank, 2)
    if rank == 1:
        handle.detach()
        return "left", threads_left()
    try:
        handle.exchange(torch.ones(3))
    except distcomp.PeerLost as error:
        told = str(error)
    else:
        told = "not noticed"
    handle.detach()
    return told, threads_left()


def test_an_exchange_that_nobody_answers_ends(doomed):
    first, second = doomed(2).results(leaves_early)
    assert not isinstance(first, Failure), first
    assert "rank 1" in first[0]
    assert first[1] == second[1] == []
