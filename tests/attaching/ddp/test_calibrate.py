"""What a step takes among real ranks, from steps that send zeros."""

import itertools

import pytest
import torch
import torch.distributed as dist

from distcomp.advice.calibrate import ROUNDS, Zeros, calibrate
from distcomp.advice.profile import profiles_of
from distcomp.attaching.observe import observe, silenced
from distcomp.collectives import DIRECT_BYTES
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.network import Fabric
from tests.attaching.ddp import jobs

SIZES = (1 << 10, 1 << 14, 1 << 16)


def stepped(rank):
    """A DDP model, and a step of it on this rank's own data."""
    model = jobs.wrap(jobs.network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step():
        jobs.train(model, optimizer, rank, 1)

    return model, optimizer, step


def gradients(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def calibrated(rank, size):
    model, _, step = stepped(rank)
    machine = calibrate(model, step, Fabric.uniform(size, "1gbit"), SIZES, cores=2)
    step()
    return machine, gradients(model)


def test_every_size_is_measured_and_the_model_is_as_before(cluster):
    answers = cluster(3).run(calibrated)
    for machine, gradient in answers:
        assert torch.equal(gradient, answers[0][1])  # averaged again, by DDP
        assert machine.slowness == machine.host.oversubscription == 1.5
        assert len(machine.observed.layouts) == len(machine.observed.ready_s) > 1
        for overhead, least in ((machine.host.direct, 1), (machine.host.around, 4 / 3 * DIRECT_BYTES)):
            asked = [max(size, least) for size in SIZES]
            assert list(overhead.nbytes) == pytest.approx(asked, rel=0.1, abs=2 * 40)
            assert len(overhead.late_s) == len(overhead.core_s) == len(SIZES)
            assert min(overhead.late_s) >= 0
            assert max(overhead.core_s) > 0


def elsewhere(rank, size, ranks):
    model, _, step = stepped(rank)
    try:
        calibrate(model, step, Fabric.uniform(ranks, "1gbit"), SIZES, cores=2)
    except DistcompError as error:
        return str(error)


@pytest.mark.parametrize(("size", "ranks"), [(2, 3), (2, 1), (1, 1)])
def test_another_number_of_ranks_is_refused(cluster, size, ranks):
    said = f"the fabric has {ranks} ranks and the model's process group {size}"
    for told in cluster(size).run(elsewhere, ranks):
        assert told.startswith(said)
        assert "calibrate on 2 or more" in told


def zeroed(rank, size, method):
    """(this rank's gradients alone, with zeros sent, averaged; a step's bytes by the ledger, as declared, as
    asked for)"""
    import distcomp

    model, optimizer, step = stepped(rank)
    layouts = observe(model, step, repeats=1).layouts
    with silenced(model):
        step()
    alone = gradients(model)
    step()
    averaged = gradients(model)
    with distcomp.attach(model, optimizer, method) as handle:
        step()
        sent = handle.stats()["last"]["payload_bytes"]
    declared = sum(method.payload_bytes(layout, size, 0) for layout in layouts)
    asked = sum(
        one.ask.sent_bytes(size)
        for aggregation in profiles_of(method, layouts, size)
        for one in aggregation.rounds
    )
    return alone, gradients(model), averaged, sent, declared, asked


@pytest.mark.parametrize(("nbytes", "around"), [(1, False), (5000, False), (12_000, True)])
def test_zeros_leave_gradients_alone_and_weigh_what_they_say(cluster, nbytes, around):
    answers = cluster(2).run(zeroed, Zeros(nbytes, around))
    assert not torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][2], answers[1][2])
    for alone, with_zeros, _, sent, declared, asked in answers:
        assert torch.equal(alone, with_zeros)
        assert sent == declared == asked > 0


def counted(rank, size):
    """Observed by a clock that ticks whenever it is read."""
    ticks = itertools.count()
    model, _, step = stepped(rank)
    dist.barrier()
    return observe(model, step, repeats=2, clock=lambda: float(next(ticks)))


def test_a_step_is_observed_by_the_clock_that_was_given(cluster):
    for observed in cluster(2).run(counted):
        # read when each gradient is there, and then when their bucket is
        ready_s = tuple(itertools.accumulate(len(layout.slices) + 1 for layout in observed.layouts))
        assert len(ready_s) > 1
        assert observed.ready_s == ready_s
        assert observed.step_s == ready_s[-1] + 1
        gradients = iter(observed.gradients)
        for layout, at_s in zip(observed.layouts, ready_s, strict=True):
            moments_s = sorted(next(gradients).ready_s for _ in layout.slices)
            assert moments_s == [at_s - back for back in range(len(moments_s), 0, -1)]


def test_a_method_of_zeros_keeps_no_state():
    layout = Layout.of([("a", (3,))])
    assert Zeros(8, False).init(layout) == {}
    assert Zeros(8, False).payload_bytes(layout, 3, 0) == ROUNDS * 2 * 40
