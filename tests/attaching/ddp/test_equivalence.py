"""What must be equal, bit for bit: identity and DDP, detached and DDP, replicas, lock-step and Gloo."""

import copy

import pytest
import torch
import torch.distributed as dist

import distcomp
from distcomp import registry
from distcomp.layout import Layout
from tests.attaching.ddp import jobs
from tests.lockstep import World

METHODS = [name for name, entry in registry.METHODS.items() if entry.kind == "gradient" and not entry.control]


def identity_and_ddp(rank, size):
    plain = jobs.wrap(jobs.network())
    jobs.train(plain, jobs.sgd(plain), rank, 6)
    model, optimizer, handle = jobs.attached("identity", rank)
    with handle:
        jobs.train(model, optimizer, rank, 6)
    return torch.equal(jobs.flat(plain), jobs.flat(model))


@pytest.mark.parametrize("size", [1, 2])
def test_identity_equals_ddp_bit_for_bit(cluster, size):
    assert cluster(size).run(identity_and_ddp) == [True] * size


def attach_detach_attach(rank, size):
    """qsgd for 3 steps, detached for 3, identity for 3; the detached part must be what plain DDP would have
    done."""
    model, optimizer, handle = jobs.attached("qsgd:bits=4", rank)
    jobs.train(model, optimizer, rank, 3)
    handle.detach()
    twin = jobs.wrap(jobs.network())
    other = jobs.sgd(twin)
    jobs.train(
        twin, other, rank, 2
    )  # DDP rebuilds its buckets: a ring's sums depend on where buffers are cut
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    jobs.train(model, optimizer, rank, 3, start=3)
    jobs.train(twin, other, rank, 3, start=3)
    detached_equal = torch.equal(jobs.flat(model), jobs.flat(twin))
    before = jobs.flat(model).clone()
    with distcomp.attach(model, optimizer, "qsgd:bits=1") as again:
        jobs.train(model, optimizer, rank, 3, start=6)
        iterations = again.stats()["iterations"]
    return detached_equal, iterations, bool((jobs.flat(model) != before).any()), jobs.replicas_equal(model)


@pytest.mark.parametrize("size", [2, 3])
def test_detached_equals_ddp_and_attaching_again_works(cluster, size):
    assert cluster(size).run(attach_detach_attach) == [(True, 3, True, True)] * size


def long_run(rank, size, spec, steps):
    """Many buckets, random delays in backward."""
    model, optimizer, handle = jobs.attached(spec, rank)
    jobs.jitter(model, rank)
    with handle:
        losses = jobs.train(model, optimizer, rank, steps)
    return jobs.replicas_equal(model), losses[0], losses[-1]


@pytest.mark.parametrize("spec", METHODS)
@pytest.mark.parametrize("size", [2, 4])
def test_replicas_stay_identical_under_random_delays(cluster, spec, size):
    for equal, _, _ in cluster(size).run(long_run, spec, 25):
        assert equal


def gloo_estimates(rank, size, spec):
    """The gradients that the ranks agree on in four steps.

    Who looks for unused parameters keeps the first step's buckets: in another order of parameters other
    ranks own the chunks, and owe what the second encoding errs.
    """
    model, optimizer, handle = jobs.attached(spec, rank, bucket_cap_mb=25, find_unused_parameters=True)
    taken = []
    with handle:
        for x, y in jobs.batches(rank, 4):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            taken.append({n: p.grad.clone() for n, p in model.module.named_parameters()})
            optimizer.step()
    return taken


def lockstep_estimates(spec, size):
    """The same training, carried in one process."""
    models = [jobs.network() for _ in range(size)]
    optimizers = [jobs.sgd(model, spec) for model in models]
    method = distcomp.parse(spec)
    named = list(models[0].named_parameters())
    layout = Layout.of([(n, tuple(p.shape)) for n, p in named], {"2.weight": "norm", "2.bias": "norm"})
    world = World(method, size, layout)
    feeds = [list(jobs.batches(rank, 4)) for rank in range(size)]
    taken = [[] for _ in range(size)]
    for step in range(4):
        buffers = []
        for rank in range(size):
            optimizers[rank].zero_grad()
            x, y = feeds[rank][step]
            torch.nn.functional.cross_entropy(models[rank](x), y).backward()
            buffers.append(torch.cat([p.grad.flatten() for p in models[rank].parameters()]))
        for rank, result in enumerate(world.aggregate(buffers)):
            grads = {s.name: piece.view(s.shape) for s, piece in layout.pieces(result.estimate)}
            for name, parameter in models[rank].named_parameters():
                parameter.grad = grads[name].clone()
            taken[rank].append(grads)
            optimizers[rank].step()
    return taken


@pytest.mark.parametrize("spec", METHODS)
def test_lockstep_equals_gloo_bit_for_bit_at_two_ranks(cluster, spec):
    real = cluster(2).run(gloo_estimates, spec)
    simulated = lockstep_estimates(spec, 2)
    for rank in range(2):
        for step in range(4):
            for name, gradient in simulated[rank][step].items():
                assert torch.equal(real[rank][step][name], gradient), (spec, rank, step, name)


@pytest.mark.parametrize("spec", METHODS)
def test_lockstep_equals_gloo_to_the_order_of_sums_at_four_ranks(cluster, spec):
    """A ring adds in another order than the ranks'. In the first step the gradients are the same; later a sum
    that was rounded otherwise may tip a value over the edge of a level, here and there."""
    real = cluster(4).run(gloo_estimates, spec)
    simulated = lockstep_estimates(spec, 4)
    for step in range(4):
        for name, expected in simulated[0][step].items():
            assert all(torch.equal(real[rank][step][name], real[0][step][name]) for rank in range(4))
            apart = (real[0][step][name] - expected).abs() > 1e-4 * expected.abs().max() + 1e-12
            assert apart.float().mean() <= (0 if step == 0 else 0.02), (spec, step, name)


def gan(rank, size):
    """Two models attached in one process, stepping in turn."""
    generator, discriminator = jobs.wrap(jobs.network(1)), jobs.wrap(jobs.network(2))
    optimizers = jobs.sgd(generator), jobs.sgd(discriminator)
    with (
        distcomp.attach(generator, optimizers[0], "qsgd:bits=4") as one,
        distcomp.attach(discriminator, optimizers[1], "qsgd:bits=1") as two,
    ):
        for step in range(4):
            jobs.train(discriminator, optimizers[1], rank, 2, start=2 * step)
            jobs.train(generator, optimizers[0], rank, 1, start=step)
        counts = one.stats()["iterations"], two.stats()["iterations"]
    return counts, jobs.replicas_equal(generator), jobs.replicas_equal(discriminator)


def test_two_models_attached_in_one_process(cluster):
    assert cluster(2).run(gan) == [((4, 8), True, True)] * 2


def subgroup(rank, size):
    """DDP on a process group that is not the world."""
    group = dist.new_group([0, 2])
    if rank == 1:
        return True
    model = jobs.wrap(jobs.network(), process_group=group)
    with distcomp.attach(model, None, "qsgd:bits=4"):
        jobs.train(model, jobs.sgd(model), rank, 3)
    mine = jobs.flat(model)
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine, group=group)
    return torch.equal(*both)


def test_ddp_on_a_subgroup_and_without_an_optimizer(cluster):
    assert cluster(3).run(subgroup) == [True] * 3
