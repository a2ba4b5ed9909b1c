"""Any two of quantizer, mask, codebook and structure, in either order: what they promise holds for both."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distcomp.parametrize import bits, chain, latent, parameters, remove
from tests.parametrize.pairs import OWNERS, PAIRS, RANK, VALUES, W, built, kinds
from tests.parametrize.toys import batch, network, train

pairs = st.sampled_from([order for pair in PAIRS for order in (pair, pair[::-1])])
seeds = st.integers(0, 10_000)
some = settings(max_examples=18)
NUMBERS, FACTORS = 288, 108


def computed(model: nn.Module) -> torch.Tensor:
    """The weight, in evaluation."""
    model.eval()
    weight: torch.Tensor = model[0].weight.detach()  # type: ignore[index]
    model.train()
    return weight


def check_promises(model: nn.Module, names: tuple[str, ...]) -> None:
    """What each of the links says about the weight or what it stands on."""
    weight = computed(model)
    links = {type(link).__name__: link for link in chain(model, W)}
    if "mask" in names:
        assert not weight[~links["Mask"].mask].any()
    if "quantizer" in names:
        assert torch.equal(weight, torch.round(weight * 16) / 16)
    if "structure" in names:
        below = latent(model, W, "precision" if "quantizer" in names else "pruning")
        assert torch.linalg.matrix_rank(below.detach(), rtol=1e-4) <= RANK
        assert [part.numel() for part in parameters(model, W)] != [NUMBERS]
    if "codebook" in names:
        (centroids,) = parameters(model, W)
        assert centroids.numel() <= VALUES
        if "structure" not in names:
            assert weight.unique().numel() <= VALUES + 1


def expected_bits(model: nn.Module, names: tuple[str, ...]) -> float:
    """Counted by hand, for each pair."""
    stored = FACTORS if "structure" in names else NUMBERS
    if "codebook" in names:
        values = parameters(model, W)[0].numel()
        total: float = 32 * values + stored * values.bit_length()
    else:
        total = 32 * stored
    if "quantizer" in names:
        total = min(total, 6 * NUMBERS)
    if "mask" in names:
        active = int(chain(model, W)[-1].mask.sum())
        if "structure" in names or "codebook" in names:
            return total + NUMBERS
        return total / NUMBERS * active + NUMBERS
    return total


@some
@given(pairs, seeds)
def test_either_order_gives_the_same_chain(names, seed) -> None:
    model, other = built(names, seed), built(names[::-1], seed)
    assert kinds(model) == kinds(other)
    assert list(model.state_dict()) == list(other.state_dict())
    for one in (model, other):
        check_promises(one, names)
        assert bits(one, W) == expected_bits(one, names)
    if set(names) == {"quantizer", "mask"}:
        assert torch.equal(model[0].weight, other[0].weight)


@some
@given(pairs, seeds)
def test_it_trains_is_saved_and_goes_on(names, seed) -> None:
    model = built(names, seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = [part.detach().clone() for part in parameters(model, W)]
    train(model, optimizer, 2)
    for part, was in zip(parameters(model, W), before, strict=True):
        assert part.grad is not None
        assert part.grad.any()
        assert not torch.equal(part, was)
    check_promises(model, names)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = built(names, seed)
    other.load_state_dict(torch.load(file, weights_only=True))
    twin = copy.deepcopy(model)
    losses = [train(one, torch.optim.SGD(one.parameters(), 0.1), 2, start=2) for one in (model, other, twin)]
    assert losses[0] == losses[1] == losses[2]
    assert torch.equal(computed(model), computed(other))


@some
@given(pairs, seeds, st.booleans(), st.booleans())
def test_they_come_off_in_either_order(names, seed, materialize, other_way) -> None:
    model = built(names, seed)
    train(model, torch.optim.SGD(model.parameters(), 0.1), 1)
    before, x = computed(model), batch()[0]
    first, second = names[::-1] if other_way else names
    theta = [part.detach().clone() for part in parameters(model, W)]
    decoded = latent(model, W, OWNERS[first]).detach().clone()
    remove(model, W, OWNERS[first], materialize=materialize, densify=True)
    assert model[0].weight.shape == (24, 12)
    assert not any(link.owner == OWNERS[first] for link in chain(model, W))
    if materialize:
        assert torch.equal(computed(model), before)
    if chain(model, W):
        left = tuple(name for name in names if name != first)
        check_promises(model, left)
        remove(model, W, OWNERS[second], materialize=materialize, densify=True)
    assert chain(model, W) == ()
    assert type(model[0]) is nn.Linear
    assert model[0].weight.shape == (24, 12)
    assert list(model.state_dict()) == list(network().state_dict())
    if materialize:
        assert torch.equal(model[0].weight, before)
    elif set(names) == {"quantizer", "mask"}:
        assert torch.equal(model[0].weight, theta[0])
    elif set(names) & {"structure", "codebook"} and first in ("quantizer", "mask"):
        assert torch.equal(model[0].weight, decoded)  # what the structure or the codebook holds, untouched
    nn.functional.cross_entropy(model(x), batch()[1]).backward()
    assert model[0].weight.grad.any()


@pytest.mark.parametrize("names", [("codebook", "structure"), ("structure", "codebook")])
def test_a_codebook_stays_when_the_structure_above_it_goes(names) -> None:
    """Fitted anew to the weight that the structure made: as many values, another shape."""
    model = built(names, 0)
    before = computed(model)
    remove(model, W, "structured", materialize=False)
    assert kinds(model) == ["Codebook"]
    after = computed(model)
    assert after.unique().numel() <= VALUES + 1
    assert (after - before).square().mean() < 0.1 * before.square().mean()
