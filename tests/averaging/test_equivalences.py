"""What must be the same, is: bit for bit where the arithmetic is exact; replicas after a thousand steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from distcomp.averaging.base import Averaging
from distcomp.averaging.extrapolation import ECD
from distcomp.averaging.gossip import DCD, DPSGD, Choco, DeepSqueeze, Gossip
from distcomp.averaging.periodic import Mean, Periodic
from distcomp.averaging.recipes import local_sgd, pqasgd, sparse_averaging
from distcomp.averaging.topology import Topology, complete
from distcomp.averaging.workers import Workers
from distcomp.compressors import Identity, Quantize, TopK
from distcomp.methods import ErrorFeedback, from_compressor, identity, qsgd
from tests.averaging.problems import stacked

LAZY = Topology("lazy ring", [np.array([[2, 1, 0, 1], [1, 2, 1, 0], [0, 1, 2, 1], [1, 0, 1, 2]]) / 4])
"""Weights that are powers of two: with small integers all arithmetic of a few steps is exact in float32."""


def exact_run(averaging: Averaging, steps: int = 4) -> Tensor:
    """Integer models, integer updates: row i is worker i's model in the end."""
    generator = torch.Generator().manual_seed(4)
    workers = Workers(averaging, torch.zeros(24), 4)
    for _ in range(steps):
        for model in workers.models:
            model += torch.randint(-8, 9, (24,), generator=generator)
        workers.step()
    return stacked(workers)


@pytest.mark.parametrize("topology", [LAZY, complete(4)], ids=["lazy", "complete"])
def test_uncompressed_gossip_is_one_algorithm_bit_for_bit(topology: Topology) -> None:
    expected = exact_run(DPSGD(topology=topology))
    assert torch.equal(exact_run(DCD(Identity(), topology)), expected)
    assert torch.equal(exact_run(ECD(Identity(), topology), 2), exact_run(DPSGD(topology=topology), 2))
    torch.testing.assert_close(exact_run(ECD(Identity(), topology)), expected)  # its weights are thirds
    assert torch.equal(exact_run(Choco(Identity(), topology, gamma=1.0)), expected)
    adapted = exact_run(DPSGD(topology=topology, order="adapt_then_combine"))
    assert torch.equal(exact_run(DeepSqueeze(Identity(), topology, eta=1.0)), adapted)
    assert not torch.equal(adapted, expected)


def test_on_a_complete_graph_gossip_is_an_all_reduce_bit_for_bit() -> None:
    """Local SGD of period 1, the plain mean, and gossip with everybody; and everybody holds the same bits."""
    everybody = exact_run(DPSGD(topology="complete", order="adapt_then_combine"))
    assert torch.equal(everybody, exact_run(Periodic()))
    assert torch.equal(everybody, exact_run(Mean()))
    assert all(torch.equal(row, everybody[0]) for row in everybody)


def test_averaging_models_every_step_is_averaging_gradients() -> None:
    """Plain SGD: what DistributedDataParallel computes, bit for bit."""
    generator = torch.Generator().manual_seed(4)
    expected = torch.zeros(24)
    for _ in range(4):
        expected += (
            torch.stack([torch.randint(-8, 9, (24,), generator=generator) for _ in range(4)]).sum(0) / 4
        )
    found = exact_run(local_sgd(period=1))
    assert all(torch.equal(row, expected) for row in found)


def test_pqasgd_without_quantization_is_local_sgd_bit_for_bit() -> None:
    assert torch.equal(exact_run(Periodic(identity(), period=2)), exact_run(local_sgd(period=2)))
    assert repr(pqasgd(period=8)) == repr(Periodic(qsgd(bits=4), period=8))


def test_a_slice_every_step_sends_what_all_every_p_steps_sends() -> None:
    at_once = Workers(sparse_averaging(period=4), torch.zeros(4096), 4)
    in_turns = Workers(sparse_averaging(period=4, schedule="round_robin"), torch.zeros(4096), 4)
    for _ in range(8):
        at_once.step()
        in_turns.step()
    sent = [workers.net.ledgers[0].requests["AllReduce"] for workers in (at_once, in_turns)]
    assert sent == [2, 8]


def noisy_run(averaging: Averaging, steps: int, numel: int = 48) -> Workers:
    """Three workers, each its own way."""
    generator = torch.Generator().manual_seed(6)
    workers = Workers(averaging, torch.randn(numel, generator=generator), 3)
    for _ in range(steps):
        for model in workers.models:
            model += 0.1 * torch.randn(numel, generator=generator)
        workers.step()
    return workers


@pytest.mark.parametrize(
    "gossip",
    [DCD(Quantize(4, block=16)), ECD(), Choco(Quantize(2, block=16))],
    ids=str,
)
def test_replicas_equal_their_owners_after_a_thousand_steps(gossip: Gossip) -> None:
    own = {DCD: "model", ECD: "estimate", Choco: "public"}[type(gossip)]
    states = [fragments[0].state for fragments in noisy_run(gossip, 1000).fragments]
    for rank, state in enumerate(states):
        for neighbour, replica in state["replicas"].items():
            owner = states[int(neighbour)][own].data
            assert replica.data.numpy().tobytes() == owner.numpy().tobytes(), (rank, neighbour)


def test_dcd_model_is_its_own_replica() -> None:
    workers = noisy_run(DCD(Quantize(4, block=16)), 20)
    for model, fragments in zip(workers.models, workers.fragments, strict=True):
        assert torch.equal(model, fragments[0].state["model"].data)


def test_anchors_are_alike_bit_for_bit_and_models_start_from_them() -> None:
    method = ErrorFeedback(from_compressor(TopK(0.1)))
    workers = noisy_run(Periodic(method, period=3), 12)
    anchors = [fragments[0].state["anchor"].data for fragments in workers.fragments]
    assert all(torch.equal(anchor, anchors[0]) for anchor in anchors)
    assert all(torch.equal(model, anchors[0]) for model in workers.models)


def test_a_run_repeats_itself_and_another_seed_does_not() -> None:
    def run(seed: int) -> Tensor:
        workers = Workers(Choco(Quantize(2, block=16)), torch.arange(64.0), 3, seed=seed)
        for index, model in enumerate(workers.models):
            model *= index
        workers.step()
        workers.step()
        return stacked(workers)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


@pytest.mark.parametrize("size", [4, 8, 16])
def test_gossip_sends_degree_payloads_however_many_workers(size: int) -> None:
    compressor = Quantize(8)
    grid = {4: 2, 8: 3, 16: 4}[size]  # a torus of 2 rows has two edges fewer, and so a double one
    for topology, degree in {"ring": 2, "torus": grid, "hypercube": grid}.items():
        workers = Workers(DCD(compressor, topology), torch.ones(1000), size)
        for _ in range(3):
            workers.step()
        sent = [ledger.total_bytes for ledger in workers.net.ledgers]
        assert sent == [3 * degree * compressor.wire_bytes(workers.layout)] * size


@pytest.mark.parametrize("order", ["combine_then_adapt", "adapt_then_combine"])
def test_the_mean_of_all_models_moves_by_the_updates_alone(order: str) -> None:
    """A third is not a float32, and three of them are more than 1: models must not grow by it."""
    generator = torch.Generator().manual_seed(8)
    workers = Workers(DPSGD(order=order), torch.ones(500), 4)
    expected = torch.full((500,), 4.0, dtype=torch.float64)
    for _ in range(300):
        updates = 0.01 * torch.randn(4, 500, generator=generator)
        expected += updates.double().sum(0)
        for model, update in zip(workers.models, updates, strict=True):
            model += update
        workers.step()
    moved = stacked(workers).double().sum(0) / expected - 1
    assert abs(float(moved.mean())) < 1e-6
