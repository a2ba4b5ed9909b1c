"""Averaging in real training loops, on real processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distcomp
from distcomp.attaching.weights import Weights
from distcomp.averaging.base import Averaging
from distcomp.averaging.gossip import DCD
from distcomp.averaging.workers import Workers
from distcomp.compressors import Quantize
from distcomp.layout import Layout
from distcomp.transports.gloo_p2p import GlooP2P
from distcomp.transports.torchdist import TorchDist
from tests.averaging import model_jobs as jobs

Clusters = Callable[[int], Any]


def in_process(averaging: Averaging, size: int, steps: int) -> list[Tensor]:
    """The same training with all workers in this process: weights without buffers."""
    models = [jobs.network(0) for _ in range(size)]
    optimizers = [jobs.sgd(model) for model in models]
    weights = [Weights(model) for model in models]
    layout = weights[0].layout
    workers = Workers(averaging, weights[0].read(layout), size, layout)
    for index in range(steps):
        for rank in range(size):
            jobs.train(models[rank], optimizers[rank], rank, 1, start=index)
            workers.models[rank].copy_(weights[rank].read(layout))
        workers.step()
        for rank in range(size):
            weights[rank].write(layout, workers.models[rank])
    return workers.models


SAME = {
    "dpsgd": distcomp.dpsgd(),
    "dcd": distcomp.dcd(),
    "ecd": distcomp.averaging.ecd(),
    "choco": distcomp.choco("topk:ratio=0.1"),
    "deepsqueeze": distcomp.averaging.deepsqueeze(period=2),
    "pqasgd": distcomp.averaging.pqasgd(period=2, bits=4),
    "round-robin": distcomp.averaging.pqasgd(period=3, bits=4, schedule="round_robin"),
    "streaming": distcomp.streaming_diloco(period=4, fragments=2, overlap=2),
    "sparse-loco": distcomp.sparse_loco(period=3, ratio=0.1, chunk=64),
    "sparta": distcomp.averaging.sparta(share=0.2),
    "noloco": distcomp.averaging.noloco(period=2, gamma=0.6),
    "sgp": distcomp.averaging.sgp(),
    "ad-psgd": distcomp.averaging.ad_psgd(staleness=2, period=3),
    "muloco": distcomp.averaging.muloco(period=3),
    "eager": distcomp.averaging.eager_diloco(period=3),
    "pulseloco": distcomp.averaging.pulseloco(period=2),
}
RESUMED = {**SAME, "des-loc": distcomp.averaging.des_loc(period=2, first_period=3)}
"""With what lock-step has no optimizer for."""


@pytest.mark.parametrize("name", SAME)
def test_real_processes_do_what_lock_step_does_bit_for_bit(name: str, cluster: Clusters) -> None:
    expected = in_process(SAME[name], 2, 7)
    found = cluster(2).run(jobs.trained, "plain", SAME[name], 7)
    for rank, (own, _, _) in enumerate(found):
        assert torch.equal(own[: expected[rank].numel()], expected[rank]), rank


@pytest.mark.parametrize("name", ["dcd", "choco", "sgp", "ad-psgd"])
def test_on_a_ring_of_four_as_well(name: str, cluster: Clusters) -> None:
    expected = in_process(SAME[name], 4, 5)
    found = cluster(4).run(jobs.trained, "plain", SAME[name], 5)
    for rank, (own, _, _) in enumerate(found):
        assert torch.equal(own[: expected[rank].numel()], expected[rank]), rank


@pytest.mark.parametrize("seeds", [(0, 0, 0), (0, 0, 1)], ids=["alike", "one differs"])
def test_models_are_sent_at_the_beginning_where_one_differs(
    seeds: tuple[int, ...], cluster: Clusters
) -> None:
    first = jobs.flat(jobs.network(seeds[0]))
    found = cluster(3).run(jobs.begun, seeds)
    assert all(torch.equal(begins_with, first) for _, begins_with in found)
    assert (sum(sent for sent, _ in found) > 4 * first.numel()) == (len(set(seeds)) > 1)


def test_gossip_inside_groups_talks_to_neighbours_of_its_own_group(cluster: Clusters) -> None:
    expected = in_process(jobs.InPairs(Quantize(8)), 4, 3)
    assert torch.equal(in_process(DCD(Quantize(8)), 2, 3)[1], expected[1])  # the first pair is alone
    found = cluster(4).run(jobs.trained, "plain", jobs.InPairs(Quantize(8)), 3)
    for rank, (own, _, _) in enumerate(found):
        assert torch.equal(own[: expected[rank].numel()], expected[rank]), rank


@pytest.mark.parametrize("carrier", [GlooP2P, TorchDist])
def test_neighbours_in_a_group_are_ranks_of_the_whole(carrier: type, cluster: Clusters) -> None:
    assert cluster(4).run(jobs.mixed_in_groups, carrier) == [3, 2, 1, 0]


@pytest.mark.parametrize("name", ["choco", "pqasgd", "streaming"])
def test_ddp_and_a_plain_module_train_alike(name: str, cluster: Clusters) -> None:
    """Under DDP gradients stay local and buffers are not broadcast; all ranks end with the same model."""
    plain = cluster(2).run(jobs.trained, "plain", SAME[name], 7)
    ddp = cluster(2).run(jobs.trained, "ddp", SAME[name], 7)
    for (a, end_a, _), (b, end_b, _) in zip(plain, ddp, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(end_a, end_b)
    assert torch.equal(ddp[0][1], ddp[1][1])
    assert not torch.equal(ddp[0][0], ddp[1][0])


def test_bytes_on_the_wire_are_degree_times_payload(cluster: Clusters) -> None:
    layout = Weights(jobs.network()).layout
    payload_bytes = Quantize(8).wire_bytes(layout)
    for size, degree in ((2, 1), (4, 2)):
        few = cluster(size).run(jobs.trained, "plain", distcomp.dcd(Quantize(8)), 2)
        many = cluster(size).run(jobs.trained, "plain", distcomp.dcd(Quantize(8)), 5)
        for (_, _, a), (_, _, b) in zip(few, many, strict=True):
            assert b["payload_bytes"] - a["payload_bytes"] == 3 * degree * payload_bytes


@pytest.mark.parametrize(
    "spec", ["ad_psgd", "streaming_diloco:period=4,fragments=2,overlap=2", "local_sgd:period=2"]
)
def test_what_is_sent_beside_the_steps_is_counted_in_a_step(spec: str, cluster: Clusters) -> None:
    """All but what the last exchanges still send when the last step is recorded."""
    steps = 24
    for recorded, sent in cluster(2).run(jobs.counted, spec, steps):
        assert len(recorded) == steps
        assert 0.8 * sent < sum(recorded) <= sent


@pytest.mark.parametrize(
    "name",
    [
        "ecd",
        "choco",
        "deepsqueeze",
        "round-robin",
        "streaming",
        "sparse-loco",
        "sparta",
        "noloco",
        "sgp",
        "ad-psgd",
        "muloco",
        "eager",
        "pulseloco",
        "des-loc",
    ],
)
def test_a_resumed_run_goes_on_bit_for_bit(name: str, cluster: Clusters) -> None:
    """Saved at step 5: with the streaming one, an exchange is under way then."""
    for through, again in cluster(2).run(jobs.resumed, "plain", RESUMED[name], 5, 10):
        assert torch.equal(through, again)


def test_a_run_under_ddp_is_resumed_too(cluster: Clusters) -> None:
    for through, again in cluster(2).run(jobs.resumed, "ddp", SAME["choco"], 3, 6):
        assert torch.equal(through, again)


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4)])
@pytest.mark.parametrize("name", ["choco", "sparse-loco", "deepsqueeze"])
def test_another_world_size_goes_on_from_the_mean(
    name: str, before: int, after: int, cluster: Clusters
) -> None:
    parts, weights = zip(*cluster(before).run(jobs.saved, SAME[name], 5), strict=True)
    mean = torch.stack(weights).mean(0)
    for at_first, _, iterations in cluster(after).run(jobs.loaded, SAME[name], list(parts), 4):
        torch.testing.assert_close(at_first, mean)
        assert iterations == 5


@pytest.mark.parametrize("kind", ["plain", "ddp"])
@pytest.mark.parametrize("name", ["choco", "pqasgd"])
def test_a_scaler_that_skips_on_one_rank_leaves_nobody_waiting(
    name: str, kind: str, cluster: Clusters
) -> None:
    (a, iterations, scale), (b, _, halved) = cluster(2).run(jobs.skipped_on_one_rank, kind, SAME[name])
    assert torch.equal(a, b)
    assert torch.isfinite(a).all()
    assert iterations == 6
    assert halved == scale / 2


@pytest.mark.parametrize("kind", ["plain", "ddp"])
def test_an_accumulated_step_is_one_iteration(kind: str, cluster: Clusters) -> None:
    for own, iterations in cluster(2).run(jobs.accumulated, kind, distcomp.local_sgd(period=4)):
        assert iterations == 6
        assert torch.isfinite(own).all()


def test_the_optimizer_state_is_kept_reset_or_averaged(cluster: Clusters) -> None:
    (before0, after0), (before1, after1) = cluster(2).run(jobs.with_optimizer_state, "keep")
    assert torch.equal(before0, after0)
    assert not torch.equal(after0, after1)
    assert [after for _, after in cluster(2).run(jobs.with_optimizer_state, "reset")] == [None, None]
    (before0, after0), (before1, after1) = cluster(2).run(jobs.with_optimizer_state, "average")
    torch.testing.assert_close(after0, (before0 + before1) / 2)
    assert torch.equal(after0, after1)


def test_buffers_are_averaged_or_kept(cluster: Clusters) -> None:
    (a, after_a), (b, after_b) = cluster(2).run(jobs.with_buffers, distcomp.local_sgd(period=3))
    torch.testing.assert_close(after_a, (a + b) / 2)
    assert torch.equal(after_a, after_b)
    (a, after_a), (b, after_b) = cluster(2).run(
        jobs.with_buffers, distcomp.local_sgd(period=3, buffers="keep")
    )
    assert torch.equal(a, after_a)
    assert not torch.equal(after_a, after_b)


def test_the_averaged_model_is_the_mean_and_goes_away_again(cluster: Clusters) -> None:
    found = cluster(2).run(jobs.evaluated, SAME["choco"])
    own = torch.stack([one["own"] for one in found])
    for one in found:
        torch.testing.assert_close(one["mean"], own.mean(0))
        assert torch.equal(one["own"], one["again"])
        assert torch.equal(one["finished"], one["mean"])
    weights = Weights(jobs.network()).layout.numel
    apart = (own - own.mean(0))[:, :weights].square().mean() ** 0.5
    assert found[0]["spread"] == pytest.approx(float(apart), rel=1e-4)
    assert found[0]["spread"] == found[1]["spread"] > 0


def test_after_detach_plain_ddp_goes_on_with_equal_replicas(cluster: Clusters) -> None:
    a, b = cluster(2).run(jobs.detached_then_ddp)
    assert torch.equal(a, b)


def test_methods_of_either_kind_follow_one_another_on_one_model(cluster: Clusters) -> None:
    assert cluster(2).run(jobs.swapped) == [0, 0]


@pytest.mark.parametrize("name", ["choco", "pqasgd", "streaming"])
def test_a_model_that_is_not_finite_is_an_error_on_every_rank(name: str, cluster: Clusters) -> None:
    for sentence in cluster(2).run(jobs.diverging, SAME[name]):
        assert "training diverged" in sentence


def test_what_cannot_be_served_is_refused_with_the_reason(cluster: Clusters) -> None:
    expected = [
        "needs a DistributedDataParallel or FSDP model",
        "find_unused_parameters",
        "SyncBatchNorm",
        "needs the optimizer",
        "accepted",
        "trains nothing|0 devices",
        "attached to this model already",
    ]
    for found in cluster(2).run(jobs.refusals):
        for sentence, pattern in zip(found, expected, strict=True):
            assert any(one in sentence for one in pattern.split("|")), (sentence, pattern)


def test_a_model_that_is_never_called_is_an_error(cluster: Clusters) -> None:
    for sentence in cluster(2).run(jobs.called_inside):
        assert "call the attached model itself" in sentence


def test_compiled_models_train_alike(cluster: Clusters) -> None:
    for eager, compiled in cluster(2).run(jobs.compiled):
        assert torch.equal(eager, compiled)


def test_weights_in_any_memory_format_are_read_and_written() -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    weights = Weights(model)
    buffer = torch.arange(float(weights.layout.numel))
    weights.write(weights.layout, buffer)
    assert torch.equal(weights.read(weights.layout), buffer)
    assert torch.equal(model.weight.flatten(), buffer[: model.weight.numel()])
    first, _ = weights.layout.split(2, 16)
    weights.write(first, torch.zeros(first.numel))
    assert torch.equal(weights.read(weights.layout)[first.numel :], buffer[first.numel :])
    assert not weights.read(first).any()


def test_frozen_parameters_and_masks_stay_out() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[0].requires_grad_(False)
    model.register_buffer("mask", torch.full((3,), -torch.inf))
    model.register_buffer("cache", torch.ones(3), persistent=False)
    weights = Weights(model)
    assert weights.layout.names == ("1.weight", "1.bias", "2.weight", "2.bias")
    assert weights.buffers == Layout.of([("2.running_mean", (3,)), ("2.running_var", (3,))])


@pytest.mark.parametrize("size", [2, 3])
def test_post_local_sgd_is_what_pytorchs_hook_and_averager_do(size: int, cluster: Clusters) -> None:
    """AdamW, which makes averaged models differ from averaged gradients: alike after each of 12 steps."""
    ours = cluster(size).run(jobs.post_local, "distcomp", 5, 3, 12)
    theirs = cluster(size).run(jobs.post_local, "pytorch", 5, 3, 12)
    for rank in range(size):
        for step, (own, reference) in enumerate(zip(ours[rank], theirs[rank], strict=True), 1):
            torch.testing.assert_close(own, reference, atol=2e-5, rtol=1e-4, msg=f"rank {rank}, step {step}")
    apart = [not torch.equal(a, b) for a, b in zip(ours[0], ours[1], strict=True)]
    assert [step for step, yes in enumerate(apart, 1) if not yes] == [1, 2, 3, 4, 5, 8, 11]


def test_post_local_sgd_needs_somebody_who_has_the_gradients(cluster: Clusters) -> None:
    with pytest.raises(Exception, match="a plain module hands them to nobody"):
        cluster(2).run(jobs.trained, "plain", distcomp.post_local_sgd(), 2)
