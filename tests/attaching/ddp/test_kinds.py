"""Parameters of every kind: each rank's own experts stay untouched; what cannot be served is one sentence;
what changes after attaching is noticed; float64 is said to be rounded."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm

import distcomp
from tests.attaching.ddp import jobs


class Experts(nn.Module):
    """A shared part, and an expert of this rank's own, wider on each rank, complex in one weight."""

    def __init__(self, rank):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(16, 24), nn.Linear(24, 5)
        torch.manual_seed(100 + rank)
        self.expert = nn.Sequential(
            nn.Linear(24, 7 + rank), nn.BatchNorm1d(7 + rank), nn.Linear(7 + rank, 24)
        )
        self.phase = nn.Parameter(torch.randn(3 + rank, dtype=torch.complex64))

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.last(x + self.expert(x)) * self.phase.abs().mean()


def own_of(module):
    return {
        name: value for name, value in module.state_dict().items() if name.startswith(("expert", "phase"))
    }


def expertly(rank, size, spec):
    """Own parts: as attaching left them, and after training, with a twin that trains without any method."""
    module = Experts(rank)
    own = own_of(module).keys()
    ignored = [*own, ".phase"]  # of the outermost module: DDP copies one name, and reduces the other
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
    before = {name: value.clone() for name, value in own_of(module).items()}
    model = DistributedDataParallel(module, bucket_cap_mb=0.001)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    untouched = True
    with distcomp.attach(model, optimizer, spec) as handle:
        untouched &= all(torch.equal(value, before[name]) for name, value in own_of(module).items())
        for x, y in jobs.batches(rank, 4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            kept = {name: value.clone() for name, value in own_of(module).items()}
            gradients = {name: p.grad.clone() for name, p in module.named_parameters() if name in own}
            optimizer.step()
            for name, gradient in gradients.items():  # its own gradient alone moved it
                untouched &= torch.equal(own_of(module)[name], kept[name].add(gradient, alpha=-0.1))
        ended = {name: value.clone() for name, value in own_of(module).items()}
        handle.state_dict()
    untouched &= all(torch.equal(value, ended[name]) for name, value in own_of(module).items())
    shared = torch.cat([p.detach().flatten() for n, p in module.named_parameters() if n not in own])
    return untouched, shared, sum(value.numel() for value in ended.values())


@pytest.mark.parametrize(
    "spec", ["qsgd:bits=4", "powersgd:min_compression=0", "ddp", "local_sgd:period=1", "choco", "sparta"]
)
def test_what_ddp_was_told_to_ignore_stays_each_ranks_own(cluster, spec):
    found = cluster(3).run(expertly, spec)
    assert all(untouched for untouched, _, _ in found)
    assert all(torch.equal(shared, found[0][1]) for _, shared, _ in found)
    assert len({numel for *_, numel in found}) == 3


def unfreeze(module):
    module[3].weight.requires_grad_(True)


def replace(module):
    module[5].weight = nn.Parameter(module[5].weight.detach().clone())


def add_weight_norm(module):
    weight_norm(module[5])


def assign(module):
    module.load_state_dict({name: value.clone() for name, value in module.state_dict().items()}, assign=True)


CHANGES = {
    "unfreeze": (unfreeze, "3.weight"), "replace": (replace, "5.weight"),
    "weight norm": (add_weight_norm, "5.parametrizations"), "assign": (assign, "0.bias"),
}  # fmt: skip


def changed(rank, size, spec, how):
    """What is told at the next exchange after a change of the module, and what detaching says."""
    module = jobs.network()
    module[3].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    handle = distcomp.attach(module, optimizer, spec)
    jobs.train(module, optimizer, rank, 2)
    CHANGES[how][0](module)
    try:
        jobs.train(module, torch.optim.SGD(module.parameters(), 0.1), rank, 2)
    except distcomp.DistcompError as error:
        return str(error)
    finally:
        handle.detach()
    return "went on"


@pytest.mark.parametrize("spec", ["local_sgd:period=1", "choco"])
@pytest.mark.parametrize("how", CHANGES)
def test_a_change_since_attaching_is_named_on_every_rank(cluster, spec, how):
    for told in cluster(2).run(changed, spec, how):
        assert "since the model was attached" in told
        assert CHANGES[how][1] in told
        assert "attach again" in told


def served(rank, size, spec, kind):
    """What attaching a model with one more parameter, or of another type, says and warns of."""
    module = jobs.network()
    if kind == "complex":
        module.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    if kind == "frozen complex":
        module.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64), requires_grad=False)
    if kind == "double":
        module = module.double()
    model = DistributedDataParallel(module, bucket_cap_mb=0.004)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            distcomp.attach(model, None, spec).detach()
        except distcomp.DistcompError as error:
            return str(error)
    return " ".join(str(one.message) for one in caught if "float64" in str(one.message))


@pytest.mark.parametrize("spec", ["qsgd:bits=4", "local_sgd"])
def test_complex_parameters_are_refused_where_they_are_trained(cluster, spec):
    for told in cluster(2).run(served, spec, "complex"):
        assert told.startswith("phase is complex")
        assert "torch.view_as_real" in told
    assert cluster(2).run(served, spec, "frozen complex") == ["", ""]


@pytest.mark.parametrize("spec", ["qsgd:bits=4", "identity", "local_sgd", "choco"])
def test_that_float64_is_rounded_is_said_once(cluster, spec):
    first, second = cluster(2).run(served, spec, "double")
    assert first.startswith("8 of 8 parameters are float64, and are exchanged as float32")
    assert second == ""


def test_where_nothing_is_rounded_nothing_is_said(cluster):
    assert cluster(2).run(served, "ddp", "double") == ["", ""]


def beyond_float32(rank: int, size: int, spec: str) -> list[bool]:
    """One step whose gradient is 1e60 on rank 0, and finite on the others; then an ordinary one."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(64, 4, bias=False).double())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that float64 is rounded
        with distcomp.attach(model, optimizer, spec):
            for times in (1e60 if rank == 0 else 1.0, 1.0):
                optimizer.zero_grad()
                (times * model(torch.ones(2, 64, dtype=torch.float64)).sum()).backward()
                seen.append(bool(model.module.weight.grad.isfinite().any()))
    return seen


@pytest.mark.parametrize("spec", ["qsgd:bits=4", "topk:ratio=0.5", "identity", "powersgd"])
def test_a_gradient_beyond_float32_is_infinite_or_nan_on_every_rank_and_leaves_no_trace(cluster, spec):
    assert cluster(2).run(beyond_float32, spec) == [[False, True]] * 2
