"""Calls that a backward goes through, against the same computed in one process."""

from __future__ import annotations

import pytest
import torch

from distcomp import calls


def rows_of(rank, count=4):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def weight(rank, rows):
    """Each rank weighs what it has received by numbers of its own."""
    generator = torch.Generator().manual_seed(50 + rank)
    return torch.randn(rows, 3, generator=generator, dtype=torch.float64)


def gathers(rank, size, codec, backward):
    rows = rows_of(rank).requires_grad_()
    gathered = calls.gather_rows(rows, codec, backward=backward)
    (gathered.sin() * weight(rank, len(gathered))).sum().backward()
    calls.disconnect()
    return gathered.detach(), rows.grad


def gathered_alone(size):
    rows = [rows_of(rank).requires_grad_() for rank in range(size)]
    whole = torch.cat(rows)
    sum((whole.sin() * weight(rank, len(whole))).sum() for rank in range(size)).backward()
    return whole.detach(), [one.grad for one in rows]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gathered_rows_have_the_gradient_of_all_ranks(cluster, size):
    whole, gradients = gathered_alone(size)
    for rank, (gathered, gradient) in enumerate(cluster(size).run(gathers, "identity", None)):
        assert torch.equal(gathered, whole)
        assert torch.allclose(gradient, gradients[rank], rtol=1e-12)


def test_each_direction_has_a_codec_of_its_own(cluster):
    whole, gradients = gathered_alone(2)
    for rank, (gathered, gradient) in enumerate(cluster(2).run(gathers, "identity", "qsgd:bits=4")):
        assert torch.equal(gathered, whole)
        error = (gradient - gradients[rank]).norm() / gradients[rank].norm()
        assert 1e-4 < error < 0.3
    for rank, (gathered, gradient) in enumerate(cluster(2).run(gathers, "qsgd:bits=8", "identity")):
        assert 1e-5 < (gathered - whole).norm() / whole.norm() < 0.02
        # The gradient is that of the rounded rows: straight through.
        assert (gradient - gradients[rank]).norm() / gradients[rank].norm() < 0.05


def counts_of(rank, size):
    return [(rank + to) % 3 for to in range(size)]


def routes(rank, size, codec):
    counts = counts_of(rank, size)
    received = [counts_of(source, size)[rank] for source in range(size)]
    rows = rows_of(rank, sum(counts)).requires_grad_()
    routed = calls.route_rows(rows, counts, received, codec)
    (routed.sin() * weight(rank, len(routed))).sum().backward()
    calls.disconnect()
    return routed.detach(), rows.grad


@pytest.mark.parametrize("size", [1, 2, 4])
def test_routed_rows_have_the_gradient_that_comes_back(cluster, size):
    rows = [rows_of(rank, sum(counts_of(rank, size))).requires_grad_() for rank in range(size)]
    pieces = [one.split(counts_of(rank, size)) for rank, one in enumerate(rows)]
    routed = [torch.cat([pieces[source][rank] for source in range(size)]) for rank in range(size)]
    sum((one.sin() * weight(rank, len(one))).sum() for rank, one in enumerate(routed)).backward()
    for rank, (received, gradient) in enumerate(cluster(size).run(routes, "identity")):
        assert torch.equal(received, routed[rank])
        assert torch.allclose(gradient, rows[rank].grad, rtol=1e-12)


def checked(rank, size):
    """gradcheck of both calls in a world of one, whose answer is itself."""
    rows = rows_of(0).requires_grad_()
    both = (
        torch.autograd.gradcheck(lambda x: calls.gather_rows(x).sin(), (rows,)),
        torch.autograd.gradcheck(lambda x: calls.route_rows(x, [4], [4]).sin(), (rows,)),
    )
    calls.disconnect()
    return both


def test_gradcheck(cluster):
    assert cluster(1).run(checked) == [(True, True)]
