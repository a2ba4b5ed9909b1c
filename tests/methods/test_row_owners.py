"""Reduce-scatter of whole parameters: the law, row by row, and what is sent to whom."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distcomp.compressors import Compressor, Identity, Quantize, TopK
from distcomp.layout import Layout
from distcomp.methods import ErrorFeedback, Partition, Rule, from_compressor, parse
from distcomp.methods.base import cut_state
from distcomp.methods.powersgd import PowerSGD
from distcomp.methods.row_owners import RowMean, needs_parameters, owners_of, to_row_owners
from tests.buffers import buffer
from tests.lockstep import World

LAYOUT = Layout.of([("a", (7, 5)), ("b", (3,)), ("c", (1, 4)), ("d", (9, 2, 2))], {"b": "norm"})
COMPRESSORS: dict[str, Compressor] = {
    "identity": Identity(),
    "4 bits": Quantize(4),
    "1 bit": Quantize(1),
    "top-k": TopK(0.3),
}


def rows_of(owner: int, size: int) -> np.ndarray:
    """Which elements of :data:`LAYOUT` an owner has, from FSDP's rule alone."""
    masks = []
    for param in LAYOUT.slices:
        of_row = np.arange(param.shape[0]) // -(-param.shape[0] // size)
        masks.append(np.repeat(of_row == owner, param.numel // param.shape[0]))
    return np.concatenate(masks)


@pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=COMPRESSORS)
@settings(max_examples=12)
@given(size=st.integers(1, 6), seed=st.integers(0, 99))
def test_each_owner_has_the_mean_of_its_rows(compressor, size, seed):
    """The owners' rows laid together times n are the sum of the contributions; elsewhere there is nothing."""
    world = World(RowMean(compressor), size, LAYOUT)
    results = world.aggregate([buffer(LAYOUT, 10 * seed + rank) for rank in range(size)])
    total = torch.stack([result.contribution().double() for result in results]).sum(0).numpy()
    for owner, result in enumerate(results):
        mine = rows_of(owner, size)
        assert np.allclose(size * result.estimate.double().numpy()[mine], total[mine], rtol=0, atol=1e-5)
        assert not result.estimate.numpy()[~mine].any()
    assert sum(world.sent_bytes) == pytest.approx(
        size * world.method.payload_bytes(LAYOUT, size, 0), abs=size
    )


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_rows_are_cut_as_fsdp_cuts_them(size):
    x = torch.arange(LAYOUT.numel, dtype=torch.float32)
    found = torch.full_like(x, -1.0)
    for owner, rows in enumerate(owners_of(LAYOUT, size)):
        assert torch.equal(rows.of(x), x[torch.from_numpy(rows_of(owner, size))])
        rows.put(rows.of(x), found)
    assert torch.equal(found, x)


def test_what_is_made_of_compressors_goes_to_the_owners_and_the_rest_to_all():
    four, exact = from_compressor(Quantize(4)), from_compressor(Identity())
    by_name = Partition(Rule(("bias",), names=("a",)), exact, ErrorFeedback(four))
    assert needs_parameters(by_name)
    assert to_row_owners(by_name) == Partition(
        by_name.rule, RowMean(Identity()), ErrorFeedback(RowMean(Quantize(4)))
    )
    assert to_row_owners(ErrorFeedback(PowerSGD())) == ErrorFeedback(PowerSGD())
    assert not needs_parameters(parse("qsgd:bits=4"))


def test_nothing_is_lost_of_whole_parameters():
    """sum_t n estimate_t + sum_i e_i = sum_t sum_i x_i, each in its owner's rows."""
    size, given_ = 3, torch.zeros(LAYOUT.numel, dtype=torch.float64)
    method = to_row_owners(
        Partition(
            Rule(("bias", "norm")), from_compressor(Identity()), ErrorFeedback(from_compressor(Quantize(2)))
        )
    )
    world, come = World(method, size, LAYOUT), torch.zeros(LAYOUT.numel, dtype=torch.float64)
    for step in range(5):
        xs = [buffer(LAYOUT, 100 * step + rank) for rank in range(size)]
        come += torch.stack(xs).double().sum(0)
        for owner, result in enumerate(world.aggregate(xs)):
            mine = torch.from_numpy(rows_of(owner, size))
            given_[mine] += size * result.estimate.double()[mine]
    owed = torch.zeros_like(given_)
    at = dict(zip(LAYOUT.names, LAYOUT.offsets, strict=True))
    for state in map(cut_state, world.states):
        for name, leaves in state.items():
            for leaf in leaves.values():
                owed[at[name] : at[name] + leaf.numel()] += leaf.double()
    assert torch.allclose(given_ + owed, come, atol=1e-4)
