"""Loss scaling: what one rank's overflow does to all of them, and that the scale changes nothing else."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distcomp
from tests.attaching.ddp import jobs


def overflow(rank, size, spec, layer, value):
    """Rank 1's gradient of one layer is not finite in step 2; nobody may step, nothing may be kept."""
    model = jobs.wrap(jobs.network())
    optimizer = jobs.sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    spoiled = {"on": False}
    parameter = list(model.module.parameters())[layer]
    parameter.register_hook(lambda g: torch.full_like(g, value) if spoiled["on"] else g)
    with distcomp.attach(model, optimizer, spec, scaler=scaler) as handle:
        scales, states, weights = [], [], []
        for step, (x, y) in enumerate(jobs.batches(rank, 5)):
            spoiled["on"] = step == 2 and rank == 1
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            seen = not all(torch.isfinite(p.grad).all() for p in model.parameters())
            scaler.step(optimizer)
            scaler.update()
            scales.append((scaler.get_scale(), seen))
            states.append(handle.state_dict()[f"rank{rank}"]["state"])
            weights.append(jobs.flat(model).clone())
        kept = all(
            torch.equal(value, states[1][name][path])
            for name, leaves in states[2].items()
            for path, value in leaves.items()
        )
        return scales, kept, torch.equal(weights[1], weights[2]), jobs.replicas_equal(model)


@pytest.mark.parametrize("layer", [0, 2, 4, -1], ids=["first", "norm", "middle", "last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("spec", ["qsgd:bits=1", "qsgd:bits=4", "bf16", "identity"])
def test_a_non_finite_gradient_reaches_every_scaler_and_leaves_no_trace(cluster, spec, layer, value):
    for scales, kept, unmoved, equal in cluster(2).run(overflow, spec, layer, value):
        assert [scale for scale, _ in scales] == [1024.0, 1024.0, 512.0, 512.0, 512.0]
        assert [seen for _, seen in scales] == [False, False, True, False, False]
        assert kept
        assert unmoved
        assert equal


def changing_scale(rank, size, spec, growth):
    model = jobs.wrap(jobs.network())
    optimizer = jobs.sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_factor=growth, growth_interval=2)
    with distcomp.attach(model, optimizer, spec, scaler=scaler):
        for x, y in jobs.batches(rank, 10):
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
    return jobs.flat(model), scaler.get_scale()


@pytest.mark.parametrize("spec", ["qsgd:bits=1", "qsgd:bits=4"])
def test_a_run_whose_scale_changes_equals_one_whose_scale_does_not(cluster, spec):
    growing = cluster(2).run(changing_scale, spec, 2.0)
    constant = cluster(2).run(changing_scale, spec, 1.0 + 1e-9)
    for (one, high), (other, low) in zip(growing, constant, strict=True):
        assert high > 16 * low
        assert torch.equal(one, other)


def skipped_on_one_rank(rank, size):
    """Without the exchange telling, rank 0 would step where rank 1 skips. The exchange's clock does not care
    who steps."""
    model, optimizer, handle = jobs.attached("qsgd:bits=1", rank)
    with handle:
        for step, (x, y) in enumerate(jobs.batches(rank, 4)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            if (step + rank) % 2:
                optimizer.step()
        dist.barrier()
        return handle.stats()["iterations"]


def test_the_clock_is_the_iteration_not_the_optimizer_step(cluster):
    assert cluster(2).run(skipped_on_one_rank) == [4, 4]
