"""Floats of few bits and the lossless stage wherever a codec stands: DDP, FSDP2 both ways, models, calls."""

from __future__ import annotations

import pytest
import torch

import distcomp
from distcomp import calls
from tests.attaching.ddp import jobs
from tests.attaching.fsdp import titan_jobs

FORMATS = ["fp8", "mxfp8:format=e5m2", "mxfp4:hadamard=true", "nvfp4"]


def trained(rank: int, size: int, method: str) -> tuple[torch.Tensor, int]:
    """The weights after a few steps under DDP, and the bytes that were sent."""
    model, optimizer, handle = jobs.attached(method, rank)
    with handle:
        jobs.train(model, optimizer, rank, 6)
        sent = handle.stats()["payload_bytes"]
    return jobs.flat(model).detach().clone(), sent


@pytest.mark.parametrize("method", FORMATS)
def test_ddp_holds_equal_replicas_near_those_of_plain_training(cluster, method: str) -> None:
    (plain, full), _ = cluster(2).run(trained, "identity")
    (first, sent), (second, _) = cluster(2).run(trained, method)
    assert torch.equal(first, second)
    assert not torch.equal(first, plain)
    assert float((first - plain).norm() / plain.norm()) < 0.2
    assert sent < 0.45 * full


@pytest.mark.parametrize("inner", ["qsgd:bits=2", "mxfp4"])
def test_the_lossless_stage_trains_to_the_same_bits_between_processes(cluster, inner: str) -> None:
    plain = cluster(2).run(trained, inner)
    coded = cluster(2).run(trained, f"lossless:inner=({inner})")
    assert torch.equal(coded[0][0], plain[0][0])
    assert torch.equal(coded[1][0], coded[0][0])


@pytest.mark.parametrize(("gradients", "weights"), [("mxfp4", "fp8"), ("nvfp4:rounding=nearest", "mxfp8")])
def test_fsdp2_in_both_directions(cluster, gradients: str, weights: str) -> None:
    plain = cluster(2).run(titan_jobs.titan, None, {}, 3, {})
    found = cluster(2).run(titan_jobs.titan, gradients, {}, 3, {"weights": weights})
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][0].isfinite().all()
    assert abs(found[0][1][-1] - plain[0][1][-1]) < 0.3 * plain[0][1][0]


def called(rank: int, size: int, codec: str) -> list[torch.Tensor]:
    mine = torch.linspace(-1, 1, 1000) * (rank + 1)
    gathered = [torch.empty_like(mine) for _ in range(size)]
    calls.all_gather(gathered, mine, codec)
    total = mine.clone()
    calls.all_reduce(total, codec)
    calls.disconnect()
    return [*gathered, total]


@pytest.mark.parametrize("codec", [*FORMATS, "fp8:block=0,rounding=nearest"])
def test_calls_take_them(cluster, codec: str) -> None:
    first, second = cluster(2).run(called, codec)
    for rank, (ours, theirs) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(ours, theirs)
        wanted = torch.linspace(-1, 1, 1000) * (rank + 1)
        assert float((ours - wanted).norm() / wanted.norm()) < 0.25


def averaged(rank: int, size: int, codec: str) -> torch.Tensor:
    model = jobs.network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    method = distcomp.diloco(period=2, compressor=codec)
    with distcomp.attach(model, optimizer, method):
        jobs.train(model, optimizer, rank, 6)
    return torch.cat([one.detach().reshape(-1) for one in model.parameters()])


@pytest.mark.parametrize("codec", ["mxfp4", "fp8"])
def test_outer_gradients_of_diloco(cluster, codec: str) -> None:
    first, second = cluster(2).run(averaged, codec)
    assert torch.equal(first, second)
    assert first.isfinite().all()
