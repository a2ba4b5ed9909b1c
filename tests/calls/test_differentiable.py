"""Calls that a backward goes through, against the same computed in one process."""

from __future__ import annotations

import pytest
import torch

import distcomp
from distcomp import calls
from tests.cluster import Cluster


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


# --------------------------------------------------------------------------------- what is compared only once


def told(rank, size, odd):
    """Counts that each rank tells each other; the words in which an odd rank is named; bytes; and rows that
    go on by what was agreed."""
    counts = torch.tensor([[10 * rank + to, 7] for to in range(size)])
    before = sum(calls.sent_bytes().values())
    try:
        received = calls.exchange_counts(counts, f"rows by {'bf16' if rank == odd else 'identity'}")
        said = ""
    except distcomp.Mismatch as error:
        received, said = torch.zeros(0), str(error)
    sent = sum(calls.sent_bytes().values()) - before
    rows = torch.full((size, 3), float(rank), requires_grad=True)
    before = sum(calls.sent_bytes().values())
    routed = calls.route_rows(rows, [1] * size, [1] * size, agreed=True)
    gathered = calls.gather_rows(rows, agreed=True)
    (routed.sum() + gathered.sum()).backward()
    agreed = sum(calls.sent_bytes().values()) - before
    calls.disconnect()
    return {
        "received": received.tolist(), "said": said, "sent": sent, "agreed": agreed,
        "routed": routed[:, 0].tolist(), "gradient": rows.grad.tolist(),
    }  # fmt: skip


@pytest.mark.parametrize("size", [2, 3])
def test_counts_arrive_with_what_is_compared(cluster, size):
    for rank, found in enumerate(cluster(size).run(told, -1)):
        assert found["received"] == [[10 * source + rank, 7] for source in range(size)]
        assert found["sent"] == (size - 1) * (32 + 8 + 2 * 4)
        # There and back, gathered and their gradients: a header and the rows to every other rank.
        row = 32 + 16  # 12 bytes, in multiples of 8
        rows = 32 + 40 if size == 3 else 32 + 24
        assert found["agreed"] == (size - 1) * (2 * row + 2 * rows)
        assert found["routed"] == [float(source) for source in range(size)]
        assert found["gradient"] == [[1.0 + size] * 3] * size


def test_who_is_about_to_do_something_else_is_named_by_every_rank(cluster):
    answers = cluster(3).run(told, 1)
    assert {found["said"] for found in answers} == {
        "ranks ask to exchange different things: rank 0 rows by identity, rank 1 rows by bf16; call it on "
        "every rank alike"
    }


def wrong_counts(rank, size):
    """Rank 0 sends a row more than rank 1 was told to expect."""
    calls.connect(timeout_s=4)
    found = []
    for counts in (torch.ones(size + 1, 2), torch.full((size, 2), 2**31)):
        try:
            calls.exchange_counts(counts, "rows")
        except distcomp.DistcompError as error:
            found.append(str(error))
    rows = torch.ones(2 + (rank == 0), 4)
    try:
        calls.route_rows(rows, [1, 1 + (rank == 0)], [1, 1], agreed=True)
    except distcomp.PeerLost as error:
        found.append(type(error).__name__ + f" {error}")
    calls.disconnect()
    return found


def test_rows_that_nobody_agreed_on_end_the_call():
    ranks = Cluster(2)
    try:
        answers = ranks.run(wrong_counts)
    finally:
        ranks.close()
    for found in answers:
        assert len([one for one in found if one.startswith("counts of rows are [2 ranks")]) == 2
    assert answers[1][-1].startswith("PeerLost")
