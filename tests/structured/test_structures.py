"""Each structure against its paper in NumPy: the weight, the nearest description, gradients, odd sizes,
bf16."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck

from distcomp import DistcompError, precision, pruning, structured
from distcomp.files.container import compress, sizes
from distcomp.parametrize import bits, chain, install, materialize, parameters, remove
from distcomp.structured import (
    CP,
    SVD,
    BlockCirculant,
    BlockDiagonal,
    Hashed,
    SparseBasis,
    Structure,
    Tucker2,
)
from tests.structured import oracles

few = settings(max_examples=15)
SHAPES = [(7, 10), (6, 5, 3), (5, 7, 3, 2), (4, 3, 2, 1, 3)]
"""Of a dense layer and of convolutions in one to three dimensions; nothing divides anything."""


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(kind: str, shape: tuple[int, ...]) -> Structure:
    groups = [torch.arange(size) % 2 for size in shape[:2]]
    return {
        "circulant": lambda: BlockCirculant(shape, 4),
        "projections": lambda: BlockCirculant(shape, max(shape[:2]), signs=True, seed=3),
        "hashed": lambda: Hashed(shape, 12, domain="space", seed=1),
        "frequencies": lambda: Hashed(shape, 12, domain="dct", seed=2),
        "svd": lambda: SVD(shape, 3),
        "tucker2": lambda: Tucker2(shape, (3, 2)),
        "cp": lambda: CP(shape, 2),
        "split": lambda: BlockDiagonal(*groups, 2),
        "basis": lambda: SparseBasis(shape),
    }[kind]()


ALL = ["circulant", "projections", "hashed", "frequencies", "svd", "tucker2", "cp", "split", "basis"]
LINEAR = ["circulant", "projections", "hashed", "frequencies"]
FOR = {
    kind: [shape for shape in SHAPES if kind not in ("tucker2", "basis") or len(shape) > 2] for kind in ALL
}
PAIRS = [(kind, shape) for kind in ALL for shape in FOR[kind]]


def theta_of(link: Structure, weight: Tensor) -> tuple[Tensor, ...]:
    theta = link.right_inverse(weight)
    return (theta,) if isinstance(theta, Tensor) else theta


def oracle(link: Structure, theta: np.ndarray) -> np.ndarray:
    """The weight that a linear structure's numbers describe, as its paper has it."""
    if isinstance(link, BlockCirculant):
        out, inputs = link.shape[:2]
        c = theta.reshape(*link.blocks, link.block, *link.shape[2:])
        return oracles.block_circulant(c, out, inputs, link.signs.double().numpy())
    assert isinstance(link, Hashed)
    return oracles.hashed(theta.ravel(), link.bucket.numpy(), link.sign.double().numpy(), bool(link.kernel))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", LINEAR)
def test_linear_structures_are_their_papers_and_the_nearest(kind, shape) -> None:
    link, weight = made(kind, shape), drawn(0, *shape)
    (theta,) = theta_of(link, weight)
    np.testing.assert_allclose(link.decode(theta).numpy(), oracle(link, theta.numpy().ravel()), atol=1e-10)
    best = oracles.nearest_linear(lambda t: oracle(link, t), theta.numel(), weight.numpy())
    np.testing.assert_allclose(link.decode(theta).numpy(), oracle(link, best), atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_svd_is_the_nearest_of_its_rank(shape) -> None:
    weight, link = drawn(0, *shape), SVD(shape, 3)
    np.testing.assert_allclose(
        link.decode(*theta_of(link, weight)).numpy(), oracles.svd(weight.numpy(), 3), atol=1e-10
    )


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_tucker_is_not_less_near_than_hosvd_and_exact_where_it_can_be(shape) -> None:
    weight, link = drawn(0, *shape), Tucker2(shape, (3, 2))
    outer, core, inner = theta_of(link, weight)
    by_hand = np.einsum("pq...,op,iq->oi...", core.numpy(), outer.numpy(), inner.numpy())
    np.testing.assert_allclose(link.decode(outer, core, inner).numpy(), by_hand, atol=1e-12)
    error = float((link.decode(outer, core, inner) - weight).square().sum())
    assert error <= np.square(oracles.hosvd(weight.numpy(), 3, 2) - weight.numpy()).sum() + 1e-12
    exact = torch.from_numpy(by_hand)
    torch.testing.assert_close(link.decode(*theta_of(link, exact)), exact, atol=1e-10, rtol=0)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_cp_is_a_sum_of_products_and_finds_one_that_is_there(shape) -> None:
    factors = [drawn(10 + dim, size, 2) for dim, size in enumerate(shape)]
    exact = sum(
        np.multiply.outer(first, rest)
        for first, rest in (
            (factors[0][:, r].numpy(), _outer([factor[:, r].numpy() for factor in factors[1:]]))
            for r in (0, 1)
        )
    )
    link = CP(shape, 2)
    np.testing.assert_allclose(link.decode(*factors).numpy(), exact, atol=1e-12)
    again = link.decode(*theta_of(link, torch.from_numpy(exact)))
    assert float((again - torch.from_numpy(exact)).norm()) < 0.02 * float(np.linalg.norm(exact))


def _outer(vectors: list[np.ndarray]) -> np.ndarray:
    product = vectors[0]
    for vector in vectors[1:]:
        product = np.multiply.outer(product, vector)
    return product


def test_cp_of_a_matrix_is_its_svd() -> None:
    weight, link = drawn(0, 7, 9), CP((7, 9), 3)
    np.testing.assert_allclose(
        link.decode(*theta_of(link, weight)).numpy(), oracles.svd(weight.numpy(), 3), atol=1e-4
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_split_keeps_what_lies_within_the_groups(shape) -> None:
    weight, link = drawn(0, *shape), made("split", shape)
    within = (torch.arange(shape[0]) % 2)[:, None] == (torch.arange(shape[1]) % 2)[None]
    kept = weight * within.view(*within.shape, *[1] * (len(shape) - 2))
    torch.testing.assert_close(link.decode(*theta_of(link, weight)), kept)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_two_bases_hold_a_convolution_exactly(shape) -> None:
    weight, link = drawn(0, *shape), SparseBasis(shape)
    channels, coefficients, space = theta_of(link, weight)
    by_hand = np.einsum("ij,ojr,jrt->oit", channels.numpy(), coefficients.numpy(), space.numpy())
    np.testing.assert_allclose(by_hand.reshape(shape), weight.numpy(), atol=1e-10)
    torch.testing.assert_close(link.decode(channels, coefficients, space), weight)
    torch.testing.assert_close(channels.T @ channels, torch.eye(shape[1], dtype=torch.float64))


@pytest.mark.parametrize(("kind", "shape"), PAIRS)
def test_gradients_are_derivatives(kind, shape) -> None:
    link = made(kind, shape)
    theta = [tensor.clone().requires_grad_() for tensor in theta_of(link, drawn(0, *shape))]
    assert gradcheck(link.decode, theta)


def layer_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, **options: int) -> nn.Module:
    torch.manual_seed(1)
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[0], dtype=dtype)
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 3]
    return convolution(shape[1], shape[0], shape[2:], dtype=dtype, **options)


def inputs_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return drawn(5, 2, shape[1], *(size + 4 for size in shape[2:])).to(dtype)


FAST = {"circulant": {"fft": True}, "projections": {"fft": True}}


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2}])
@pytest.mark.parametrize(("kind", "shape"), PAIRS)
def test_a_layer_computes_with_theta_what_it_computes_with_the_weight(kind, shape, options) -> None:
    layer, x = layer_of(shape, **options if len(shape) > 2 else {}), inputs_of(shape)
    link = made(kind, shape)
    if isinstance(link, BlockCirculant):
        link.fft = True
    structured.install_structures(layer, None, lambda *_: link)
    x = x.requires_grad_()
    y = layer(x)
    theta = parameters(layer, "weight")
    computed = link.compute(layer, x, *theta)
    if isinstance(link, BlockCirculant | BlockDiagonal):
        assert computed is not None  # the path that is under test is taken
    dense = materialize(copy.deepcopy(layer))
    assert type(dense) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    torch.testing.assert_close(y, dense(x), atol=1e-9, rtol=1e-7)
    gradients = torch.autograd.grad(y.square().sum(), [x, *theta, layer.bias])
    layer_again = torch.func.functional_call(dense, {"weight": link.decode(*theta)}, (x,))
    wanted = torch.autograd.grad(layer_again.square().sum(), [x, *theta])
    for gradient, other in zip(gradients, wanted, strict=False):
        torch.testing.assert_close(gradient, other, atol=1e-8, rtol=1e-6)


@few
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 10), st.booleans(), st.integers(0, 5))
def test_circulant_layers_of_any_size_and_block(out, inputs, block, signs, seed) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(inputs, out).double(), drawn(seed, 3, 2, inputs)
    structured.circulant(layer, block, signs=signs, fft=True, seed=seed)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    link = chain(layer, "weight")[0]
    (c,) = parameters(layer, "weight")
    np.testing.assert_allclose(
        layer.weight.detach().numpy(), oracle(link, c.detach().numpy().ravel()), atol=1e-12
    )


@pytest.mark.parametrize(("kind", "shape"), PAIRS)
def test_bf16_stays_bf16(kind, shape) -> None:
    layer, x = layer_of(shape, torch.bfloat16), inputs_of(shape, torch.bfloat16)
    link = made(kind, shape)
    if isinstance(link, BlockCirculant):
        link.fft = True
    structured.install_structures(layer, None, lambda *_: link)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    dense = materialize(copy.deepcopy(layer)).double()
    torch.testing.assert_close(y.double(), dense(x.double()), atol=0.1, rtol=0.1)
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in layer.parameters())


@pytest.mark.parametrize(("kind", "shape"), PAIRS)
def test_bits_are_the_bytes_of_a_file(kind, shape) -> None:
    """Random floats do not shrink: the container holds each tensor as it is, or nearly."""
    layer = layer_of(shape, torch.float32)
    structured.install_structures(layer, None, lambda *_: made(kind, shape))
    state = {k: v for k, v in layer.state_dict().items() if "bias" not in k}
    if kind == "basis":  # a mask is a bool in a state dict, and a bit at rest
        state = {k: v for k, v in state.items() if not k.endswith("support")}
        bits_beside = chain(layer, "weight")[0].support.numel()
    else:
        bits_beside = 0
    if not kind.startswith(("circulant", "projections", "hashed", "frequencies")):
        assert not any(key.endswith("seed") for key in state)
    dense = sum(size.dense_bytes for size in sizes(compress(state, 1)))
    assert bits(layer, "weight") == 8 * dense + bits_beside


@pytest.mark.parametrize(("kind", "shape"), PAIRS)
def test_what_is_stored_is_no_vector_which_methods_would_leave_as_it_is(kind, shape) -> None:
    assert all(theta.dim() >= 2 for theta in theta_of(made(kind, shape), drawn(0, *shape)))


@pytest.mark.parametrize("kind", ALL)
def test_quantizers_and_masks_stand_on_it(kind) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))
    convolved = kind in ("tucker2", "cp", "basis")
    dense_layer, shape = ("0", (8, 3, 3, 3)) if convolved else ("3", (10, 128))
    structured.install_structures(net, dense_layer, lambda *_: made(kind, shape))
    precision.gradual(net, None, "Q2.4", skip=())
    mask = pruning.Mask(net.get_submodule(dense_layer).weight)
    mask.mask.copy_(torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5)
    install(net, f"{dense_layer}.weight", mask)
    weight = net.get_submodule(dense_layer).weight
    assert torch.equal(weight * 16, (weight * 16).round())  # on the grid
    assert not weight[~mask.mask].any()
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(net(x), materialize(copy.deepcopy(net))(x))
    net(x).square().mean().backward()
    theta = parameters(net, f"{dense_layer}.weight")
    assert any(tensor.grad.any() for tensor in theta)
    before = weight.detach().clone()
    remove(net, f"{dense_layer}.weight", "structured", densify=True)
    torch.testing.assert_close(net.get_submodule(dense_layer).weight.detach(), before)


@pytest.mark.parametrize("kind", LINEAR)
def test_a_fresh_structure_has_the_variance_of_the_weight(kind) -> None:
    weight = drawn(0, 96, 64, 3, 3)
    link = (
        made(kind, tuple(weight.shape))
        if kind != "hashed"
        else Hashed(tuple(weight.shape), 3000, domain="space")
    )
    if kind == "frequencies":
        link = Hashed(tuple(weight.shape), 3000, shape=(1, 1))
    theta = link.fresh(*theta_of(link, weight))
    assert float(link.decode(*theta).var()) == pytest.approx(float(weight.var()), rel=0.15)
    assert float(link.decode(*theta_of(link, weight)).var()) < 0.5 * float(weight.var())


def test_what_is_drawn_comes_back_with_the_state_dict() -> None:
    for change in (
        lambda net, seed: structured.circulant(net, None, signs=True, seed=seed),
        lambda net, seed: structured.hashed(net, 4, seed=seed),
    ):
        nets = []
        for seed in (1, 2):
            torch.manual_seed(0)
            nets.append(change(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 4)), seed))
        x = torch.randn(2, 3, 4, 4)
        assert not torch.allclose(nets[0](x), nets[1](x))
        nets[1].load_state_dict(nets[0].state_dict())
        assert torch.equal(nets[0](x), nets[1](x))


@few
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=7),
    st.floats(0, 1),
    st.floats(0.3, 4),
    st.floats(0.3, 4),
)
def test_bands_share_the_budget(counts, place, a, b) -> None:
    budget = len(counts) + round(place * (sum(counts) - len(counts)))
    sizes_ = structured.hashed.__globals__["shares"](counts, budget, a, b)
    assert sum(sizes_) == budget
    assert all(1 <= size <= count for size, count in zip(sizes_, counts, strict=True))


def test_low_frequencies_get_more_where_the_shape_says_so() -> None:
    low = Hashed((8, 8, 5, 5), 200, shape=(1, 2.5)).sizes
    flat = Hashed((8, 8, 5, 5), 200, shape=(1, 1)).sizes
    assert sum(low[:3]) > sum(flat[:3])
    assert sum(low[-3:]) < sum(flat[-3:])


# ----------------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize(("rows", "columns"), [(20, 30), (50, 16), (24, 24)])
@pytest.mark.parametrize(("rank", "noise"), [(0, 1.0), (3, 0.05), (5, 0.2)])
def test_evbmf_is_the_papers_and_finds_the_rank_under_noise(rows, columns, rank, noise) -> None:
    y = drawn(1, rows, rank) @ drawn(2, rank, columns) + noise * drawn(3, rows, columns)
    values = torch.linalg.svdvals(y)
    found = structured.evbmf_rank(values, rows, columns)
    assert found == oracles.evbmf_rank(values.numpy(), rows, columns)
    assert found == rank


def test_a_rank_is_a_number_a_share_or_a_name() -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 0.1])
    assert structured.chosen_rank(values, 4, 4, 2) == 2
    assert structured.chosen_rank(values, 4, 4, 9) == 4
    assert structured.chosen_rank(values, 4, 4, 9 / 14.01 - 1e-3) == 1
    assert structured.chosen_rank(values, 4, 4, 9 / 14.01 + 1e-3) == 2
    for wrong in (0, -1, 1.5, "full", True, 0.0):
        with pytest.raises(DistcompError, match=r"rank is a number|below 1, not"):
            structured.chosen_rank(values, 4, 4, wrong)


# ----------------------------------------------------------------------------------------------- what is said


def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    for call, words in (
        (lambda: structured.circulant(net, 0), "1 row or more, not 0"),
        (lambda: structured.circulant(net, 4, fft="fast"), "True, False or 'auto'"),
        (
            lambda: structured.circulant(net, 4, layers="fc*"),
            "names no linear layer or convolution; there are: '0', '1'",
        ),
        (lambda: structured.circulant(net, 4, start="zero"), "'nearest' to the weight"),
        (lambda: structured.hashed(net, 0.5), "1 or more times smaller"),
        (lambda: structured.hashed(net, 2, domain="fft"), "a domain of"),
        (lambda: Hashed((4, 4, 3, 3), 2), "2 values cannot describe .* in 5 bands"),
        (lambda: structured.low_rank(net, 8), "factors of rank 8 are 128 numbers"),
        (lambda: structured.low_rank(net, 2, kind="qr"), "'tucker2', 'svd' or 'cp'"),
        (lambda: structured.low_rank(net, 0.5, kind="cp"), "CP takes a number of components"),
        (lambda: structured.summary(nn.ReLU()), "no parameters"),
        (lambda: BlockDiagonal(torch.zeros(3), torch.zeros(4), 2), "group 1 of 2 has no output"),
    ):
        with pytest.raises(DistcompError, match=words):
            call()
    assert not any(chain(net, f"{layer}.weight") for layer in "01")
    structured.circulant(net, 4)
    with pytest.raises(DistcompError, match="has a structure already; remove it first"):
        structured.low_rank(net, 2)


def test_layers_that_would_not_shrink_stay_dense() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    with torch.no_grad():
        net[1].weight.copy_(torch.outer(torch.randn(40), torch.randn(40)) + 1e-3 * torch.randn(40, 40))
    structured.low_rank(net, 0.99)
    assert [len(chain(net, f"{layer}.weight")) for layer in "01"] == [0, 1]
    assert chain(net, "1.weight")[0].rank == 1


def test_a_summary_counts_what_is_stored_exchanged_and_multiplied() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 16))
    structured.circulant(net, 4, layers="3", fft=False)
    structured.low_rank(net, 2, layers="0")
    net[0].bias.requires_grad_(False)
    costs = structured.summary(net, torch.randn(1, 3, 6, 6))
    assert [layer.name for layer in costs.layers] == ["0", "1", "3"]
    conv, norm, fc = costs.layers
    assert conv.parameters == (216 + 8, 8 * 2 + 2 * 27 + 8)
    assert conv.exchanged_bytes == (4 * 216, 4 * 70)  # its bias is frozen
    assert conv.multiplications == (216 * 36, 70 * 36)
    assert norm.parameters == (16, 16)
    assert fc.parameters == (288 * 16 + 16, 288 * 16 // 4 + 16)
    assert fc.multiplications == (288 * 16, 288 * 16)  # made, and multiplied as a whole
    assert fc.stored_bytes[1] == 4 * (288 * 4 + 16) + 8
    assert costs.exchanged_bytes == sum(4 * p.numel() for p in net.parameters() if p.requires_grad)
    assert costs.activation_bytes == 4 * (8 * 36 + 8 * 36 + 16)
    assert "4,624 -> 1,168" in str(costs)
    fft = structured.circulant(nn.Linear(256, 256), 256, fft=True)
    (row,) = structured.summary(fft, torch.randn(1, 256)).layers
    assert row.multiplications == (65536, 4 * 129 + 2 * 256 * 8 * 2)


def test_an_empty_batch_goes_through_a_layer_that_multiplies_by_fft() -> None:
    dense, convolution = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Conv2d(8, 8, 3))
    for model, x in ((dense, torch.zeros(0, 8)), (convolution, torch.zeros(0, 8, 5, 5))):
        structured.circulant(model, 4, fft=True)
        assert len(model(x)) == 0


def test_sparse_bases_leave_dense_layers_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    assert structured.sparse_convolution(model).names == ["0.weight"]
    assert type(model[2].weight) is nn.Parameter
    with pytest.raises(DistcompError, match="none of the layers named is a convolution"):
        structured.sparse_convolution(nn.Sequential(nn.Linear(4, 2)))
