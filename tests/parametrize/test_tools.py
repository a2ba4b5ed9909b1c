"""Other people's tools on models whose weights are described: DCP, averaged copies, the compiler."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from distcomp import pruning
from distcomp.parametrize import materialize, parameters
from tests.parametrize.pairs import PAIRS, W, built
from tests.parametrize.toys import batch, network, train

pairs = pytest.mark.parametrize("names", PAIRS, ids="-".join)


@pairs
def test_a_distributed_checkpoint_gives_back_what_it_was_given(names, tmp_path) -> None:
    model, other = built(names, 0), built(names, 0)
    train(model, torch.optim.SGD(model.parameters(), 0.1), 2)
    checkpoint.save(model.state_dict(), checkpoint_id=tmp_path / "saved", no_dist=True)
    state = other.state_dict()
    checkpoint.load(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    other.load_state_dict(state)
    assert torch.equal(model(batch()[0]), other(batch()[0]))


@pairs
def test_an_averaged_copy_averages_what_is_stored(names) -> None:
    model = built(names, 0)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    start = [part.detach().clone() for part in parameters(model, W)]
    average.update_parameters(model)
    train(model, torch.optim.SGD(model.parameters(), 0.1), 1)
    average.update_parameters(model)
    for mean, was, now in zip(parameters(average.module, W), start, parameters(model, W), strict=True):
        torch.testing.assert_close(mean, (was + now) / 2)
    before = average(batch()[0])
    materialize(model)
    assert torch.equal(average(batch()[0]), before)
    assert torch.equal(materialize(average.module)(batch()[0]), before)


@pairs
def test_the_compiler_traces_it(names) -> None:
    eager, traced = built(names, 0), built(names, 0)
    compiled = torch.compile(traced, backend="eager")
    x, y = batch()
    for model in (eager, compiled):
        nn.functional.cross_entropy(model(x), y).backward()
    for one, two in zip(eager.parameters(), traced.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-7)


def test_a_plain_state_applies_every_chain() -> None:
    for names in PAIRS:
        model = built(names, 0).eval()
        plain = network()
        plain.load_state_dict(pruning.plain_state(model))
        assert torch.equal(plain(batch()[0]), model(batch()[0]))
