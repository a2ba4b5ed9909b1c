"""Optimizers that ask for several gradients in one step (SAM, LBFGS): what is averaged are the weights after
it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import distcomp
from tests.averaging import step_jobs as jobs
from tests.cluster import Cluster

Clusters = Callable[[int], Cluster]

GOSSIP = distcomp.dpsgd(order="adapt_then_combine", topology="complete")
"""On a complete graph it averages over all."""


@pytest.mark.parametrize("spec", ["local_sgd:period=1", GOSSIP], ids=["periodic", "gossip"])
@pytest.mark.parametrize("how", ["sam", "sam as a closure", "lbfgs"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_step_of_several_gradients_is_one_iteration(
    spec: str | distcomp.Averaging, how: str, size: int, cluster: Clusters
) -> None:
    found = cluster(size).run(jobs.alike, spec, how, 5)
    for expected, weights, iterations, _ in found:
        torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-4)
        assert iterations == 5
    evaluated = [counts for *_, counts in found]
    assert how != "lbfgs" or evaluated[0] != evaluated[1]


@pytest.mark.parametrize("spec", ["local_sgd:period=1", "choco"])
def test_perturbed_weights_are_not_averaged(spec: str, cluster: Clusters) -> None:
    for told in cluster(2).run(jobs.perturbed, spec):
        assert told.startswith("DistcompError: weights were moved after a backward by no step")
        assert "handle.no_sync()" in told


def test_a_loop_without_an_optimizer_moves_the_weights_itself(cluster: Clusters) -> None:
    assert cluster(2).run(jobs.by_hand) == [4, 4]
