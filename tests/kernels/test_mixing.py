"""Models mixed in one pass, and moved by what was decoded: C equals torch, on each instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distcomp.compressors import Quantize
from distcomp.compressors.base import Compressor
from distcomp.compressors.natural import NonUniform
from distcomp.errors import DistcompError
from distcomp.kernels import dispatch, mixing
from distcomp.layout import Layout
from distcomp.randomness import Key
from tests.kernels.draws import same_bits
from tests.kernels.test_cpu import instruction_set, threads
from tests.kernels.test_many import monkeypatch_context
from tests.kernels.test_one_pass import awkward

__all__ = ["instruction_set", "monkeypatch_context", "threads"]  # fixtures

_cpu = pytest.importorskip("distcomp.kernels._cpu", reason="the C extension was not built (no C compiler?)")

NUMELS = st.integers(1, 80) | st.sampled_from([1023, 1024, 1025, 5000])
WEIGHTS = st.floats(-2, 2, width=32)


def models_of(count: int, numel: int, seed: int) -> list[torch.Tensor]:
    return [awkward(numel, seed + index) for index in range(count)]


@settings(max_examples=60, deadline=None)
@given(numel=NUMELS, weights=st.lists(WEIGHTS, max_size=4), gamma=WEIGHTS, seed=st.integers(0, 99))
def test_one_pass_equals_torch(instruction_set, monkeypatch_context, numel, weights, gamma, seed) -> None:
    models = models_of(len(weights) + 1, numel, seed)
    x, public = models_of(2, numel, seed + 50)
    ours = mixing.mix(models, weights), *mixing.pull(x, public, models, weights, gamma)
    with monkeypatch_context() as patch:
        patch.setattr(dispatch, "forced", lambda: "reference")
        theirs = mixing.mix(models, weights), *mixing.pull(x, public, models, weights, gamma)
    for one, other in zip(ours, theirs, strict=True):
        assert same_bits(one, other)


@settings(max_examples=30, deadline=None)
@given(numel=NUMELS, weights=st.lists(WEIGHTS, max_size=4), gamma=WEIGHTS, seed=st.integers(0, 99))
def test_threads_that_share_the_pass_change_nothing(
    threads, monkeypatch_context, numel, weights, gamma, seed
):
    models = models_of(len(weights) + 1, numel, seed)
    ours = mixing.pull(models[0], models[-1], models, weights, gamma)
    with monkeypatch_context() as patch:
        patch.setattr(dispatch, "forced", lambda: "reference")
        theirs = mixing.pull(models[0], models[-1], models, weights, gamma)
    assert same_bits(ours[0], theirs[0])
    assert same_bits(ours[1], theirs[1])


COMPRESSORS = st.sampled_from(
    [
        Quantize(4),
        Quantize(1),
        Quantize(8, block=7),
        Quantize(4, plain=("bias",)),
        NonUniform(4),
        NonUniform(4, block=5),
    ]
)


@settings(max_examples=60, deadline=None)
@given(compressor=COMPRESSORS, rows=st.integers(1, 40), times=WEIGHTS | st.just(1.0), seed=st.integers(0, 99))
def test_decoding_onto_a_model_equals_adding_what_was_decoded(
    instruction_set, monkeypatch_context, compressor: Compressor, rows, times, seed
) -> None:
    layout = Layout.of([("weight", (rows, 33)), ("bias", (rows,))])
    base = awkward(layout.numel, seed)
    payload = compressor.encode(awkward(layout.numel, seed + 1), layout, Key.of(seed))
    before = base.clone()
    ours = compressor.decode_onto(base, payload, layout, times)
    assert same_bits(base, before)
    with monkeypatch_context() as patch:
        patch.setattr(dispatch, "forced", lambda: "reference")
        theirs = torch.add(base, compressor.decode(payload, layout), alpha=times)
    assert same_bits(ours, theirs)


def test_models_of_other_sizes_or_types_are_refused() -> None:
    x = torch.zeros(8)
    for other in (torch.zeros(7), torch.zeros(9), torch.zeros(8, dtype=torch.float64), torch.zeros(16)[::2]):
        with pytest.raises(DistcompError, match="values of a model"):
            mixing.mix([x, other], [0.5])
        for given_ in ((other, x), (x, other)):
            with pytest.raises(DistcompError, match="values of a model"):
                mixing.pull(*given_, [x, x], [0.5], 0.5)
    with pytest.raises(DistcompError, match="0 weights were given for 2 models"):
        mixing.mix([x, x], [])


@pytest.mark.parametrize(
    ("count", "span"), [(0, (0, 8, 8)), (1, (0, 9, 8)), (1, (-1, 8, 8)), (1, (0, -1, 8))]
)
def test_numbers_that_reach_outside_are_refused_in_c(count, span) -> None:
    model = torch.zeros(8).data_ptr()
    with pytest.raises(ValueError, match="this number of models, or these elements"):
        _cpu.mix(model, 0, 0, count, span, (0, 0, 0, 0.0))
