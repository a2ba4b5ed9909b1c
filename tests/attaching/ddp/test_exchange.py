"""``handle.exchange``: any tensor, by any gradient method, over the line of an attached model."""

import io

import pytest
import torch
from torch import nn

import distcomp
from distcomp.layout import Layout
from distcomp.methods.base import all_reduce_bytes
from tests.attaching.ddp import jobs


def own(rank, *shape, dtype=torch.float32, seed=0):
    """A rank's tensor: multiples of 1/8 below 8, whose sums are exact in every order."""
    generator = torch.Generator().manual_seed(100 * rank + seed)
    return (torch.randint(-64, 64, shape, generator=generator) / 8).to(dtype)


def sent(handle):
    return handle.stats()["payload_by_kind"]


def mean_of_anything(rank, size):
    _, _, handle = jobs.attached("qsgd:bits=4", rank)
    with handle:
        found = []
        for shape, dtype in [((3, 5), torch.float32), ((), torch.float64), ((0, 2), torch.float32),
                             ((64,), torch.bfloat16)]:  # fmt: skip
            tensor = own(rank, *shape, dtype=dtype)
            before = tensor.clone()
            mean = handle.exchange(tensor)
            everyone = torch.stack([own(r, *shape, dtype=dtype).double() for r in range(size)])
            found.append((mean.shape == tensor.shape, mean.dtype == dtype, torch.equal(tensor, before),
                          torch.equal(mean, everyone.mean(0).to(torch.float32).to(dtype))))  # fmt: skip
        return found, dict(sent(handle))


@pytest.mark.parametrize("size", [2, 4])
def test_the_mean_of_anything(cluster, size):
    for found, bytes_by_kind in cluster(size).run(mean_of_anything):
        assert all(all(facts) for facts in found), found
        summed = sum(all_reduce_bytes(4 * numel, size) for numel in (15, 1, 64))
        assert bytes_by_kind["values"] == summed
        assert bytes_by_kind["digest"] == 4 * 8 * (size - 1)


def counted(rank, size, spec):
    _, _, handle = jobs.attached("identity", rank)
    with handle:
        estimate = handle.exchange(own(rank, 40, 30), spec)
        method = distcomp.parse(spec)
        declared = method.payload_bytes(Layout.of([("x", (40, 30))]), size, 0)
        return estimate, declared, dict(sent(handle))


@pytest.mark.parametrize("spec", ["qsgd:bits=4", "topk:ratio=0.1", "powersgd:rank=1", "fp16"])
def test_by_any_method_with_the_bytes_that_it_declares(cluster, spec):
    (first, declared, kinds), (second, _, _) = cluster(2).run(counted, spec)
    assert torch.equal(first, second)
    assert first.abs().sum() > 0
    header = 24
    assert sum(kinds.values()) - kinds["digest"] - header == pytest.approx(declared, abs=header)


def in_training(rank, size, spec, plain, exchanges):
    """Weights after training, with exchanges in every place where they may be."""
    module = jobs.network()
    model = module if plain else jobs.wrap(module)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with distcomp.attach(model, optimizer, spec) as handle:
        means = []
        for index, (x, y) in enumerate(jobs.batches(rank, 6)):
            for place in range(3):
                if place == 0:
                    optimizer.zero_grad()
                if place == 1:
                    outputs = model(x)
                if place == 2:
                    nn.functional.cross_entropy(outputs, y).backward()
                if exchanges:
                    tensor = own(rank, 33, seed=10 * index + place)
                    expected = sum(own(r, 33, seed=10 * index + place) for r in range(size)) / size
                    means.append(torch.equal(handle.exchange(tensor), expected))
            optimizer.step()
        return jobs.flat(model), means


@pytest.mark.parametrize(
    ("spec", "plain"),
    [("qsgd:bits=2", False), ("none", False), ("local_sgd:period=2", True), ("choco", True),
     ("diloco:period=2", False)],
)  # fmt: skip
def test_in_order_with_training_which_stays_as_it_is(cluster, spec, plain):
    without = cluster(2).run(in_training, spec, plain, False)
    for (weights, means), (expected, _) in zip(
        cluster(2).run(in_training, spec, plain, True), without, strict=True
    ):
        assert len(means) == 18
        assert all(means)
        assert torch.equal(weights, expected)


def over_shards(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = jobs.network()
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with distcomp.attach(model, optimizer, "qsgd:bits=4") as handle:
        jobs.train(model, optimizer, rank, 2)
        mean = handle.exchange(own(rank, 7))
        jobs.train(model, optimizer, rank, 2, start=2)
        return torch.equal(mean, sum(own(r, 7) for r in range(size)) / size), handle.stats()["iterations"]


def test_beside_sharded_training(cluster):
    assert cluster(2).run(over_shards) == [(True, 4)] * 2


def usage(rank, size, name, count):
    _, _, handle = jobs.attached("identity", rank)
    with handle:
        estimates = [handle.exchange(own(rank, 50), "topk:ratio=0.1", name=name) for _ in range(count)]
        residual = sum(
            leaf.clone()
            for key, leaves in handle.state_dict()[f"rank{rank}"]["state"].items()
            for leaf in leaves.values()
            if key.startswith("exchange/")
        )
        return estimates, residual


def test_a_name_owes_what_was_not_sent(cluster):
    results = cluster(3).run(usage, "usage", 12)
    put_in = 12 * sum(own(rank, 50) for rank in range(3))
    came_out = 3 * sum(results[0][0])
    torch.testing.assert_close(came_out + sum(residual for _, residual in results), put_in, atol=1e-3, rtol=0)
    assert len({tuple(one.tolist()) for one in results[0][0]}) > 6


def test_without_a_name_nothing_is_remembered(cluster):
    for estimates, residual in cluster(2).run(usage, None, 3):
        assert residual == 0
        assert torch.equal(estimates[0], estimates[1])


def halves(rank, size, spec, saved, count):
    _, _, handle = jobs.attached("qsgd:bits=4", rank)
    with handle:
        if saved is not None:
            handle.load_state_dict(saved[rank])
        named = [handle.exchange(own(rank, 6, 8, seed=1), spec, name="a") for _ in range(count)]
        unnamed = [handle.exchange(own(rank, 48), "qsgd:bits=2") for _ in range(count)]
        file = io.BytesIO()
        torch.save(handle.state_dict(), file)
        file.seek(0)
        return named, unnamed, torch.load(file, weights_only=True)


@pytest.mark.parametrize("spec", ["qsgd:bits=1", "powersgd:rank=1,min_compression=0"])
def test_a_checkpoint_holds_them(cluster, spec):
    whole = cluster(2).run(halves, spec, None, 6)
    first = cluster(2).run(halves, spec, None, 3)
    second = cluster(2).run(halves, spec, [saved for *_, saved in first], 3)
    for (named, unnamed, _), (a, b, _), (c, d, _) in zip(whole, first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(named, a + c, strict=True))
        assert all(torch.equal(x, y) for x, y in zip(unnamed, b + d, strict=True))


def poisoned(rank, size):
    _, _, handle = jobs.attached("identity", rank)
    with handle:
        first = handle.exchange(own(rank, 9), "topk:ratio=0.2", name="a")
        before = handle.state_dict()[f"rank{rank}"]["state"]["exchange/a"]
        bad = own(rank, 9)
        if rank == 1:
            bad[3] = float("inf")
        told = handle.exchange(bad, "topk:ratio=0.2", name="a")
        after = handle.state_dict()[f"rank{rank}"]["state"]["exchange/a"]
        return (
            bool(first.isfinite().all()),
            bool(told.isnan().all()),
            all(torch.equal(before[path], after[path]) for path in before),
        )


def test_a_value_that_is_not_finite_reaches_everybody_and_no_state(cluster):
    assert cluster(2).run(poisoned) == [(True, True, True)] * 2


def differing(rank, size, what):
    _, _, handle = jobs.attached("identity", rank)
    odd = rank == 1
    shape = (5,) if odd and what == "shape" else (4,)
    dtype = torch.float64 if odd and what == "dtype" else torch.float32
    method = "fp16" if odd and what == "method" else "qsgd:bits=4"
    with handle:
        try:
            handle.exchange(
                torch.ones(shape, dtype=dtype), method, name="b" if odd and what == "name" else "a"
            )
        except distcomp.Mismatch as error:
            return str(error), handle.exchange(torch.full((3,), float(rank))).tolist()
    return "not noticed", []


@pytest.mark.parametrize(
    ("what", "words"),
    [("shape", "(5,)"), ("dtype", "float64"), ("method", "dtype='fp16'"), ("name", "name='b'")],
)
def test_ranks_that_differ_are_named_on_all_and_the_line_goes_on(cluster, what, words):
    for sentence, mean in cluster(3).run(differing, what):
        assert "rank 0 (4,) of torch.float32" in sentence
        assert "rank 1 (" in sentence
        assert words in sentence
        assert mean == [1.0] * 3


def said(call):
    try:
        call()
    except (distcomp.DistcompError, RuntimeError) as error:
        return str(error)
    return "not refused"


def refused(rank, size):
    model, _, handle = jobs.attached("qsgd:bits=4", rank)
    x, y = next(jobs.batches(rank, 1))
    told = {}

    def within(name):
        def hook(*_):
            told.setdefault(name, said(lambda: handle.exchange(torch.ones(3))))

        return hook

    with handle:
        jobs.train(model, jobs.sgd(model), rank, 2)
        hooks = [model.module[0].register_forward_hook(within("forward")),
                 model.module[0].weight.register_hook(within("backward"))]  # fmt: skip
        nn.functional.cross_entropy(model(x), y).backward()
        for hook in hooks:
            hook.remove()
        told["integers"] = said(lambda: handle.exchange(torch.ones(3, dtype=torch.int64)))
        told["averaging"] = said(lambda: handle.exchange(torch.ones(3), "local_sgd"))
        told["stock"] = said(lambda: handle.exchange(torch.ones(3), "ddp"))
        handle.exchange(torch.ones(3), "topk", name="a")
        told["shape"] = said(lambda: handle.exchange(torch.ones(4), "topk", name="a"))
        told["still"] = handle.exchange(torch.ones(3)).tolist()
    plain = jobs.wrap(jobs.network())
    with distcomp.attach(plain, None, "ddp") as stock:
        told["hooks"] = said(lambda: stock.exchange(torch.ones(3)))
    return told


def test_what_cannot_be_exchanged_is_refused_with_its_reason(cluster):
    for told in cluster(2).run(refused):
        assert "inside a forward or a backward" in told["forward"]
        assert "inside a forward or a backward" in told["backward"]
        assert "dense floating-point" in told["integers"]
        assert "no gradient method" in told["averaging"]
        assert "ddp" in told["stock"]
        assert "use another name" in told["shape"]
        assert told["still"] == [1.0] * 3
        assert "PyTorch's own reduction" in told["hooks"]
