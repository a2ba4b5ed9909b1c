"""Products with a few vectors: right in float64, and the same bits however they were computed."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from distcomp.kernels import dispatch, lowrank

_cpu = pytest.importorskip("distcomp.kernels._cpu", reason="the C extension was not built (no C compiler?)")

SIZES = st.integers(1, 70) | st.sampled_from([2047, 2048, 2049, 4100])


@st.composite
def products(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """p, q and a matrix, which may lie at any address."""
    a, b, rank = draw(SIZES), draw(SIZES), draw(st.integers(1, lowrank.FEW + 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    offset = draw(st.integers(0, 3))
    matrix = torch.randn(offset + a * b, generator=generator)[offset:].view(a, b)
    return torch.randn(rank, a, generator=generator), torch.randn(rank, b, generator=generator), matrix


def everything(p: Tensor, q: Tensor, matrix: Tensor) -> list[Tensor]:
    made, less = torch.empty_like(matrix), matrix.clone()
    lowrank.outer(p, q, made)
    lowrank.subtract_outer(p, q, less)
    added = lowrank.times_rows(q, matrix, (less, torch.empty_like(matrix)))
    return [lowrank.times_rows(q, matrix), lowrank.times_columns(p, matrix), made, less, added]


@given(products())
def test_products_are_right(case: tuple[Tensor, Tensor, Tensor]) -> None:
    p, q, matrix = (one.double() for one in case)
    less = matrix - p.T @ q
    exact = [q @ matrix.T, p @ matrix, p.T @ q, less, q @ (matrix + less).T]
    most_less = matrix.abs() + p.abs().T @ q.abs()
    bound = [q.abs() @ matrix.abs().T, p.abs() @ matrix.abs(), p.abs().T @ q.abs(), most_less,
             q.abs() @ (matrix.abs() + most_less).T]  # fmt: skip
    for found, right, most in zip(everything(*case), exact, bound, strict=True):
        assert found.dtype == torch.float32
        assert ((found - right).abs() <= 1e-7 * 70 * most).all()


@given(products(), st.integers(0, 3))
def test_the_bits_do_not_depend_on_where_and_by_whom(
    instruction_sets: list[str], case: tuple[Tensor, Tensor, Tensor], offset: int
) -> None:
    p, q, matrix = case
    if len(p) > lowrank.FEW:
        return
    first = everything(*case)
    elsewhere = torch.empty(offset + matrix.numel())[offset:].view(matrix.shape).copy_(matrix)
    for name in instruction_sets:
        _cpu.use(name)
        for found, before in zip(everything(p, q, elsewhere), first, strict=True):
            assert torch.equal(found, before)


@given(products(), st.integers(0, 3))
def test_a_residual_is_added_in_the_same_pass_with_the_same_bits(
    instruction_sets: list[str], case: tuple[Tensor, Tensor, Tensor], offset: int
) -> None:
    _, q, matrix = case
    residual = torch.empty(offset + matrix.numel())[offset:].view(matrix.shape).copy_(matrix.flip(0) / 3)
    for name in instruction_sets:
        _cpu.use(name)
        total = torch.full_like(matrix, float("nan"))
        found = lowrank.times_rows(q, matrix, (residual, total))
        assert torch.equal(total, matrix + residual)
        if len(q) <= lowrank.FEW:  # with more of them BLAS's bits depend on where things lie
            assert torch.equal(found, lowrank.times_rows(q, matrix + residual))


@pytest.mark.parametrize("small", [0, lowrank.SMALL])
def test_each_matrix_of_a_flat_buffer_with_its_residual(monkeypatch: pytest.MonkeyPatch, small: int) -> None:
    monkeypatch.setattr(lowrank, "SMALL", small)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    shapes = lowrank.Products(((2, 5, 7, 3), (4, 33, 40, 40), (1, 6, 4, 1400)))
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(1430, generator=generator) for _ in range(2))
    q = torch.randn(shapes.numels["q"], generator=generator)
    total = torch.zeros_like(x)
    found = lowrank.each_times_rows(q, x, shapes, (residual, total))
    assert torch.equal(found, lowrank.each_times_rows(q, x + residual, shapes))
    wanted = torch.zeros_like(x)
    for _, a, b, at in shapes.each:
        wanted[at : at + a * b] = (x + residual)[at : at + a * b]
    assert torch.equal(total, wanted)


def test_threads_share_a_large_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q, matrix = (torch.randn(*shape, generator=generator) for shape in ((4, 701), (4, 903), (701, 903)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = everything(p, q, matrix)
        torch.set_num_threads(3)
        together = everything(p, q, matrix)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@given(products())
def test_what_ranks_must_agree_on_has_the_same_bits_without_the_extension(
    case: tuple[Tensor, Tensor, Tensor],
) -> None:
    p, q, matrix = case
    if len(p) > lowrank.FEW:
        return
    compiled, plain = torch.empty_like(matrix), torch.empty_like(matrix)
    lowrank.outer(p, q, compiled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "forced", lambda: "reference")
        dispatch._choose.cache_clear()
        lowrank.outer(p, q, plain)
    dispatch._choose.cache_clear()
    assert torch.equal(compiled, plain)
