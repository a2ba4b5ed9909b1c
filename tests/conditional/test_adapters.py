"""Adapters of a model of transformers whose factors take turns, and rows of a layer that are dropped, by the
bytes that go out."""

from __future__ import annotations

import pytest
import torch

from tests.conditional import adapter_jobs as jobs

SMALL = 200
"""Bytes of a step besides values: headers, and what ranks compare."""


@pytest.mark.parametrize("method", ["identity", "qsgd:bits=8"])
def test_factors_of_adapters_take_turns_and_only_they_are_sent(cluster, method):
    """Against one process that steps one factor in each iteration; half of the adapters' bytes, none of the
    model's."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    bits, near = (32, 1e-5) if method == "identity" else (8, 2e-2)
    for found in cluster(2).run(jobs.adapters, method, 6):
        assert found["moved"] == [["down"], ["up"]] * 3
        assert found["frozen kept"]
        assert found["alike"]
        assert (0 if method == "identity" else 1e-7) <= found["distance"] < near
        half = found["trained"] / 2 * bits / 8
        for nbytes in found["sent"]:
            assert half < nbytes < 1.02 * half + SMALL


def test_rows_that_are_dropped_under_ddp_are_not_sent(cluster):
    """A step sends the rows that are kept, their biases and the other layer; the weights are those of
    the same steps with everything sent."""
    both = [cluster(2).run(jobs.units, active) for active in (True, False)]
    for found, whole in zip(*both, strict=True):
        assert min(found["kept"]) < 64
        assert found["alike"]
        assert found["stay"]
        assert torch.allclose(found["weights"], whole["weights"], atol=1e-6)
        for rows, nbytes, everything in zip(found["kept"], found["sent"], whole["sent"], strict=True):
            values = 4 * (rows * 33 + 4 * 65)
            assert values <= nbytes < values + SMALL
            assert everything >= 4 * (64 * 33 + 4 * 65)
