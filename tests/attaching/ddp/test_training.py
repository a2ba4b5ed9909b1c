"""The ways people train: accumulation, unused and tied and frozen parameters, mixed types, uneven inputs,
clipping, compile."""

import os
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distcomp
from tests.attaching.ddp import jobs

SPECS = ["identity", "qsgd:bits=4", "qsgd:bits=1"]


def accumulation(rank, size, spec):
    """Two micro-batches under no_sync and one outside equal one exchange of their sum."""
    model, optimizer, handle = jobs.attached(spec, rank)
    with handle:
        for step in range(3):
            optimizer.zero_grad()
            for index, (x, y) in enumerate(jobs.batches(rank, 3, 3 * step)):
                with model.no_sync() if index < 2 else nullcontext():
                    nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return handle.stats()["iterations"], jobs.replicas_equal(model)


@pytest.mark.parametrize("spec", SPECS)
def test_gradient_accumulation_under_no_sync(cluster, spec):
    assert cluster(2).run(accumulation, spec) == [(3, True)] * 2


class Branches(nn.Module):
    """Uses one of two branches; the other's parameters get no gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.trunk = nn.Linear(16, 32)
        self.left, self.right = nn.Linear(32, 5), nn.Linear(32, 5)
        self.go_left = True

    def forward(self, x):
        x = torch.relu(self.trunk(x))
        return self.left(x) if self.go_left else self.right(x)


def unused(rank, size, spec):
    model = jobs.wrap(Branches(), find_unused_parameters=True)
    optimizer = jobs.sgd(model)
    with distcomp.attach(model, optimizer, spec) as handle:
        for step in range(6):
            model.module.go_left = (step + rank) % 2 == 0  # ranks use different branches
            jobs.train(model, optimizer, rank, 1, start=step)
        return handle.stats()["iterations"], jobs.replicas_equal(model)


@pytest.mark.parametrize("spec", SPECS)
def test_unused_parameters(cluster, spec):
    assert cluster(2).run(unused, spec) == [(6, True)] * 2


def static_graph(rank, size, spec):
    model, optimizer, handle = jobs.attached(spec, rank, static_graph=True)
    with handle:
        jobs.train(model, optimizer, rank, 5)
        return handle.stats()["iterations"], jobs.replicas_equal(model)


@pytest.mark.parametrize("spec", SPECS)
def test_static_graph(cluster, spec):
    assert cluster(2).run(static_graph, spec) == [(5, True)] * 2


def bucket_view(rank, size, spec):
    model, optimizer, handle = jobs.attached(spec, rank, gradient_as_bucket_view=True)
    with handle:
        jobs.train(model, optimizer, rank, 5)
        return jobs.flat(model)


def ordinary(rank, size, spec):
    model, optimizer, handle = jobs.attached(spec, rank)
    with handle:
        jobs.train(model, optimizer, rank, 5)
        return jobs.flat(model)


@pytest.mark.parametrize("spec", SPECS)
def test_gradient_as_bucket_view_changes_nothing(cluster, spec):
    for viewed, copied in zip(cluster(2).run(bucket_view, spec), cluster(2).run(ordinary, spec), strict=True):
        assert torch.equal(viewed, copied)


def rebuilt_buckets(rank, size, spec):
    """Residuals follow their parameters when DDP rebuilds its buckets: nothing of what came in is lost."""
    model = jobs.wrap(jobs.network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    received = {n: torch.zeros_like(p) for n, p in model.module.named_parameters()}
    given = {n: torch.zeros_like(p) for n, p in model.module.named_parameters()}
    twin = jobs.network()
    with distcomp.attach(model, optimizer, spec) as handle:
        layouts = []
        for x, y in jobs.batches(rank, 4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            twin.zero_grad()
            nn.functional.cross_entropy(twin(x), y).backward()
            for name, parameter in model.module.named_parameters():
                received[name] += parameter.grad * size
                given[name] += dict(twin.named_parameters())[name].grad
            optimizer.step()
            layouts.append(tuple(sorted(one.names for one in handle._sync.states._by_layout)))
        residual = {
            n: leaves.get("residual") for n, leaves in handle.state_dict()[f"rank{rank}"]["state"].items()
        }
    for name, mine in given.items():
        debt = residual.get(name)
        mine -= 0 if debt is None else debt.view_as(mine)
        dist.all_reduce(mine)
    worst = max(float((given[n] - received[n]).abs().max()) for n in given)
    return len(set(layouts)), worst


def test_sent_plus_residual_is_what_came_in_across_a_bucket_rebuild(cluster):
    for layouts, worst in cluster(2).run(rebuilt_buckets, "qsgd:bits=1"):
        assert layouts == 2, "DDP did not rebuild its buckets: the test tests nothing"
        assert worst < 1e-5


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.encode, self.decode, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.decode.weight = self.encode.weight
        self.frozen = nn.Linear(16, 16)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.head(torch.tanh(self.decode(torch.tanh(self.frozen(self.encode(x))))))


def tied_and_frozen(rank, size, spec):
    model = jobs.wrap(Tied())
    optimizer = jobs.sgd(model)
    frozen = model.module.frozen.weight.clone()
    with distcomp.attach(model, optimizer, spec):
        jobs.train(model, optimizer, rank, 5)
    kept = torch.equal(frozen, model.module.frozen.weight)
    return jobs.replicas_equal(model), kept, model.module.decode.weight is model.module.encode.weight


@pytest.mark.parametrize("spec", SPECS)
def test_tied_and_frozen_parameters(cluster, spec):
    assert cluster(2).run(tied_and_frozen, spec) == [(True, True, True)] * 2


def mixed_types(rank, size, spec):
    module = jobs.network()
    module[3].to(torch.bfloat16)
    module[3].register_forward_pre_hook(lambda _, inputs: inputs[0].bfloat16())
    module[3].register_forward_hook(lambda _, inputs, output: output.float())
    model = jobs.wrap(module)
    optimizer = jobs.sgd(model)
    with distcomp.attach(model, optimizer, spec):
        losses = jobs.train(model, optimizer, rank, 20)
    return jobs.replicas_equal(model), losses[-1] < losses[0]


@pytest.mark.parametrize("spec", [*SPECS, "bf16", "fp16"])
def test_bf16_and_mixed_parameters(cluster, spec):
    assert cluster(2).run(mixed_types, spec) == [(True, True)] * 2


def uneven(rank, size, spec):
    """Rank 1 has fewer batches; Join shadows its exchanges."""
    model, optimizer, handle = jobs.attached(spec, rank)
    with handle:
        with model.join():
            jobs.train(model, optimizer, rank, 7 - 3 * rank)
        return handle.stats()["iterations"]


@pytest.mark.parametrize("spec", SPECS)
def test_join_with_uneven_inputs(cluster, spec):
    assert cluster(2).run(uneven, spec) == [7, 7]


def clipping(rank, size):
    model, optimizer, handle = jobs.attached("qsgd:bits=4", rank)
    norms = []
    with handle:
        for x, y in jobs.batches(rank, 4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.01)))
            optimizer.step()
        return norms, jobs.replicas_equal(model)


def test_gradient_clipping_sees_the_reduced_gradient(cluster):
    (norms, equal), (others, _) = cluster(2).run(clipping)
    assert equal
    assert norms == others


def compiled(rank, size):
    model, optimizer, handle = jobs.attached("qsgd:bits=4", rank, bucket_cap_mb=25)
    faster = torch.compile(model, backend="aot_eager")
    with handle:
        jobs.train(faster, optimizer, rank, 4)
        count = handle.stats()["iterations"]
    with distcomp.attach(faster, optimizer, "identity") as again:
        jobs.train(faster, optimizer, rank, 2)
        return count, again.stats()["iterations"], jobs.replicas_equal(model)


def test_compiled_ddp(cluster):
    assert cluster(2).run(compiled) == [(4, 2, True)] * 2


def refusals(rank, size):
    """Each refusal's sentence."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def sentence(act):
        try:
            act()
        except distcomp.DistcompError as error:
            return str(error)
        return "not refused"

    hooked = jobs.wrap(jobs.network())
    hooked.register_comm_hook(None, allreduce_hook)
    sparse = jobs.wrap(nn.Sequential(nn.Embedding(8, 4, sparse=True)))
    model, _, handle = jobs.attached("identity", rank)
    free = jobs.wrap(jobs.network())
    zero = ZeroRedundancyOptimizer(free.parameters(), torch.optim.SGD, overlap_with_ddp=True, lr=0.1)
    found = [
        sentence(lambda: distcomp.attach(hooked, None, "identity")),
        sentence(lambda: distcomp.attach(sparse, None, "identity")),
        sentence(lambda: distcomp.attach(model, None, "identity")),
        sentence(lambda: distcomp.attach(jobs.network(), None, "identity")),
        sentence(lambda: distcomp.attach(free, zero, "identity")),
        sentence(lambda: distcomp.attach(free, None, "qsgd:bits=9")),
        sentence(lambda: distcomp.attach(free, None, "qsgdd")),
        sentence(lambda: distcomp.attach(free, None, "qsgd:bit=4")),
        sentence(lambda: distcomp.attach(free, None, None)),
    ]
    handle.detach()
    return found


def test_what_cannot_be_served_is_refused_by_name(cluster):
    expected = [
        "already has a communication hook",
        "sparse gradients",
        "attached to this model already",
        "DistributedDataParallel",
        "overlap_with_ddp",
        "1 to 8 bits",
        "no method 'qsgdd'",
        "no setting 'bit=4'",
        "no method was given",
    ]
    for found in cluster(2).run(refusals):
        for sentence, words in zip(found, expected, strict=True):
            assert words in sentence


def never_ran(rank, size):
    model, optimizer, handle = jobs.attached("identity", rank)
    with handle:
        x, y = next(jobs.batches(rank, 1))
        nn.functional.cross_entropy(model.module(x), y).backward()
        try:
            optimizer.step()
        except distcomp.DistcompError as error:
            return str(error)
    return "not noticed"


def test_a_step_whose_gradients_never_went_through_is_noticed(cluster):
    for sentence in cluster(2).run(never_ran):
        assert "no gradient went through the attached method" in sentence


def throttled_stock(rank, size, spec):
    """Seconds of the exchange, and the least that its bytes take at the pretended rate."""
    os.environ["DISTCOMP_THROTTLE_BPS"] = "4e6"
    try:
        model, optimizer, handle = jobs.attached(spec, rank)
    finally:
        del os.environ["DISTCOMP_THROTTLE_BPS"]
    with handle:
        jobs.train(model, optimizer, rank, 2)
        last = handle.stats()["last"]
    return last["exchange_s"], 8 * last["payload_bytes"] / 4e6


@pytest.mark.parametrize("spec", ["ddp", "torch:fp16", "torch:powersgd"])
def test_where_the_link_is_pretended_pytorchs_own_reductions_pay_for_their_bytes_too(cluster, spec):
    for exchange_s, least_s in cluster(2).run(throttled_stock, spec):
        assert exchange_s >= least_s > 0


def closures(rank, size):
    """The backward happens inside the optimizer's step."""
    model, optimizer, handle = jobs.attached("qsgd:bits=4", rank)
    plain, plain_optimizer, other = jobs.attached("qsgd:bits=4", rank)
    with handle, other:
        jobs.train(plain, plain_optimizer, rank, 3)
        for x, y in jobs.batches(rank, 3):

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
        return handle.stats()["iterations"], torch.equal(jobs.flat(model), jobs.flat(plain))


def test_a_step_with_a_closure(cluster):
    assert cluster(2).run(closures) == [(3, True)] * 2


def closure_that_goes_round(rank, size):
    model, optimizer, _ = jobs.attached("qsgd:bits=4", rank)
    optimizer.step(lambda: model.module(torch.ones(1, 16)).sum().backward())


def test_a_closure_that_goes_round_the_model_is_told(cluster):
    for result in cluster(2).results(closure_that_goes_round):
        assert "no gradient went through" in result.text
