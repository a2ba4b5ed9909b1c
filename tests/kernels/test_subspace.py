"""Projections of slices: right in float64, and the same bits restored however they were computed."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.kernels import dispatch, subspace
from distcomp.kernels.subspace import Known, Sliced

_cpu = pytest.importorskip("distcomp.kernels._cpu", reason="the C extension was not built (no C compiler?)")

Case = tuple[Known, Tensor, Tensor, list[Tensor], list[Tensor]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Matrices anywhere in a flat buffer, x and means, bases and offsets."""
    each, at = [], draw(st.integers(0, 3))
    for _ in range(draw(st.integers(1, 3))):
        units, slices = draw(st.sampled_from([1, 2, 31, 65, 520])), draw(st.integers(1, 21))
        run, most = draw(st.sampled_from([1, 3, 32, 75])), draw(st.integers(1, 7))
        bases = -(-slices // draw(st.integers(1, slices)))
        each.append(Sliced(at, units, slices, run, bases, most, draw(st.integers(1, most))))
        at += each[-1].numel + draw(st.integers(0, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x, mean = torch.randn(2, at, generator=generator)
    bases_ = [torch.randn(one.bases, one.most, one.k, generator=generator).bfloat16() for one in each]
    offsets = [torch.randn(one.slices, one.most, generator=generator) for one in each]
    return Known(tuple(each)), x, mean, bases_, offsets


def exact(case: Case) -> tuple[Tensor, Tensor]:
    """Coefficients, and what they restore, slice by slice in float64."""
    known, x, mean, bases, offsets = case
    coefficients, out = [], torch.zeros(len(x), dtype=torch.float64)
    for one, basis, offset in zip(known.each, bases, offsets, strict=True):
        for s in range(one.slices):
            u = basis[s // one.share, : one.dims].double()
            c = u @ one.view(x)[s].double().reshape(-1) - offset[s, : one.dims].double()
            coefficients.append(c)
            back = (u.T @ c).view(one.units, one.run) + one.view(mean)[s].double()
            one.view(out)[s] = back
    return torch.cat(coefficients), out


def both(case: Case) -> tuple[Tensor, Tensor]:
    known, x, mean, bases, offsets = case
    out = torch.zeros_like(x)
    coefficients = subspace.project_slices(x, bases, offsets, known)
    subspace.restore(coefficients, bases, mean, out, known)
    return coefficients, out


@given(cases())
def test_projections_are_right(case: Case) -> None:
    for found, right in zip(both(case), exact(case), strict=True):
        assert (found - right).abs().max() <= 1e-5 * right.abs().max() + 1e-5


@given(cases())
def test_the_bits_do_not_depend_on_by_whom(instruction_sets: list[str], case: Case) -> None:
    first = both(case)
    for name in instruction_sets:
        _cpu.use(name)
        for found, before in zip(both(case), first, strict=True):
            assert torch.equal(found, before)
    known, x, mean, bases, _ = case
    out = torch.zeros_like(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "forced", lambda: "reference")
        subspace.restore(first[0], bases, mean, out, known)
    assert torch.equal(out, first[1])


@given(cases())
def test_squares_are_added_up_piece_by_piece(case: Case) -> None:
    known, x, mean, _, _ = case
    found = subspace.squared_distances(x, mean, known.pieces)
    for one, (whole, centred) in zip(known.each, found.tolist(), strict=True):
        own, means = (values[one.at : one.at + one.numel].double() for values in (x, mean))
        assert whole == pytest.approx(float(own.square().sum()), rel=1e-5)
        assert centred == pytest.approx(float((own - means).square().sum()), rel=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    known = Known((Sliced(0, 2, 3, 4, 1, 2, 2),))
    x, basis, offset = torch.zeros(24), torch.zeros(1, 2, 8).bfloat16(), torch.zeros(3, 2)
    for bad in (
        lambda: subspace.project_slices(x[:20], [basis], [offset], known),
        lambda: subspace.project_slices(x, [basis[:, :, :7]], [offset], known),
        lambda: subspace.project_slices(x, [basis], [offset[:2]], known),
        lambda: subspace.project_slices(x, [basis.half()], [offset], known),
        lambda: subspace.restore(torch.zeros(5), [basis], x, torch.zeros(24), known),
        lambda: subspace.squared_distances(x, x[:20], known.pieces),
    ):
        with pytest.raises(DistcompError):
            bad()
    lines = known.lines()
    with pytest.raises(ValueError, match="slice 0"):
        _cpu.subspace_project(x.data_ptr(), 0, x.data_ptr(), *lines, 0, 0, (23, 6))
    with pytest.raises(ValueError, match="piece 0"):
        _cpu.squares(x.data_ptr(), x.data_ptr(), x.data_ptr(), known.pieces.data_ptr(), 1, 23)
