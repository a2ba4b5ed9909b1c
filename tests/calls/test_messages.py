"""send and recv with a codec, between processes: dtypes and shapes, orders that block nobody, mistakes."""

from __future__ import annotations

import pytest
import torch

import distcomp
from distcomp import calls
from tests.calls.test_calls import DTYPES, SHAPES, own

BOUNDS = {
    "qsgd:bits=8": 1e-3,
    "qsgd:bits=4": 0.2,
    "bf16": 1e-4,
    "topk:ratio=0.5": 0.3,
    "mxfp8": 0.01,
    "nvfp4": 0.1,
}
"""Relative squared errors."""


def passed_on(rank, size, group=None, dtypes=DTYPES):
    """Of each dtype and shape: does what goes around all ranks come back bit for bit?"""
    calls.connect(group)
    wrong = []
    for dtype in dtypes:
        for shape in SHAPES:
            mine, got = own(rank, shape, dtype), torch.empty(shape, dtype=dtype)
            sending = calls.send(mine, (rank + 1) % size, group=group, async_op=True)
            calls.recv(got, (rank - 1) % size, group=group)
            sending.wait()
            wrong += [(dtype, shape)] * (not torch.equal(got, own((rank - 1) % size, shape, dtype)))
    calls.disconnect(group)
    return wrong


@pytest.mark.parametrize("size", [2, 3])
def test_identity_brings_every_dtype_and_shape_bit_for_bit(cluster, size):
    assert cluster(size).run(passed_on) == [[]] * size


def by_codecs(rank, size, group=None):
    """The relative error of each codec, for columns of a matrix too, and what was sent."""
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(1))
    found = {}
    for codec in BOUNDS:
        for dtype in (torch.float32, torch.bfloat16, torch.complex64):
            given = (x.to(dtype) if dtype != torch.complex64 else torch.complex(x, -x)).t()
            if rank == 0:
                calls.send(given, 1, codec, group=group)
                continue
            got = torch.empty_like(given)
            calls.recv(got, 0, codec, group=group)
            error = (got - given).abs().double().pow(2).sum() / given.abs().double().pow(2).sum()
            found[codec, dtype] = float(error), got.dtype == dtype
    sent = dict(calls.sent_bytes(group))
    calls.disconnect(group)
    return found, sent


def test_a_codec_errs_by_its_own_bound(cluster):
    (_, sent), (found, answered) = cluster(2).run(by_codecs)
    assert len(found) == 18
    for (codec, dtype), (error, same_dtype) in found.items():
        alike = (codec, dtype) == ("bf16", torch.bfloat16)
        assert alike if error == 0 else error < BOUNDS[codec] + 1e-4, (codec, dtype, error)
        assert same_dtype
    assert sent["codes"] > 0
    assert set(answered) == {"header", "digest"}  # the receiver answers with headers alone


def counted(rank, size):
    calls.connect()
    x = torch.ones(64, 512)
    if rank == 0:
        calls.send(x, 1, "qsgd:bits=4")
    elif rank == 1:
        calls.recv(x, 0, "qsgd:bits=4")
    sent = dict(calls.sent_bytes())
    calls.disconnect()
    return sent


def test_bytes_are_those_of_the_codec_and_who_has_no_part_sends_none(cluster):
    sender, receiver, other = cluster(3).run(counted)
    assert (sender["codes"], sender["digest"]) == (64 * 512 // 2, 8)
    assert sender["scales"] <= 64 * 512 // 512 * 4
    assert (receiver["digest"], receiver["header"], other) == (8, 64, {})


def repeated(rank, size):
    """What came of one tensor that is sent twice, and of it sent back."""
    x, got = torch.linspace(-1, 1, 1024), [torch.empty(1024) for _ in range(2)]
    for one in got:
        calls.send(x, 1, "qsgd:bits=2") if rank == 0 else calls.recv(one, 0, "qsgd:bits=2")
    calls.recv(got[0], 1, "qsgd:bits=2") if rank == 0 else calls.send(x, 0, "qsgd:bits=2")
    calls.disconnect()
    return [one.tolist() for one in got]


def test_every_message_is_rounded_by_numbers_of_its_own(cluster):
    (back, _), (first, second) = cluster(2).run(repeated)
    assert first != second
    assert back not in (first, second)


def crossed(rank, size, group=None):
    """Both send before they receive; several of one length are under way, beside an all-reduce, and waited
    for from the last to the first."""
    other, ends = 1 - rank, []
    given = [own(rank, (300, 7), torch.float32, seed) for seed in range(4)]
    got = [torch.empty(300, 7) for _ in given]
    total = torch.full((300, 7), 1.0 + rank)
    ends += [calls.send(one, other, group=group, async_op=True) for one in given]
    ends += [calls.all_reduce(total, group=group, async_op=True)]
    ends += [calls.recv(one, other, group=group, async_op=True) for one in got]
    for work in reversed(ends):
        work.wait()
    calls.disconnect(group)
    right = [torch.equal(one, own(other, (300, 7), torch.float32, seed)) for seed, one in enumerate(got)]
    return right, total.unique().tolist()


def test_both_ranks_may_send_first_and_messages_keep_their_order(cluster):
    assert cluster(2).run(crossed) == [([True] * 4, [3.0])] * 2


def with_nan(rank, size):
    x = torch.ones(50)
    if rank == 0:
        x[3] = float("inf")
        calls.send(x, 1, "qsgd:bits=4")
        calls.send(x, 1)
        calls.send(torch.ones(50), 1, "qsgd:bits=4")
        calls.disconnect()
        return x.isinf().sum().item()
    first, exact, clean = torch.empty(50), torch.empty(50), torch.empty(50)
    calls.recv(first, 0, "qsgd:bits=4")
    calls.recv(exact, 0)
    calls.recv(clean, 0, "qsgd:bits=4")
    calls.disconnect()
    return first.isnan().sum().item(), exact.isinf().sum().item(), clean.isfinite().all().item()


def test_what_is_not_finite_is_announced_and_leaves_no_trace(cluster):
    assert cluster(2).run(with_nan) == [1, (50, 1, True)]


def differing(rank, size, how):
    """Rank 0 sends to rank 2, which expects something else; then again, and alike."""
    calls.connect(timeout_s=5)
    x = torch.ones(8, 4)
    said = "has no part in it"
    shape, codec, dtype = {
        "shape": ((4, 8), "qsgd:bits=4", torch.float32),
        "codec": ((8, 4), "qsgd:bits=8", torch.float32),
        "dtype": ((8, 4), "qsgd:bits=4", torch.float64),
    }[how]
    try:
        if rank == 0:
            calls.send(x, 2, "qsgd:bits=4")
        if rank == 2:
            calls.recv(torch.full(shape, 7.0, dtype=dtype), 0, codec)
    except distcomp.Mismatch as error:
        said = str(error)
    if rank == 0:
        calls.send(x, 2, "identity")
    if rank == 2:
        calls.recv(x.zero_(), 0, "identity")
    calls.disconnect()
    return said, x.sum().item()


@pytest.mark.parametrize("how", ["shape", "codec", "dtype"])
def test_what_differs_is_named_at_both_ends_and_the_line_goes_on(cluster, how):
    (sender, _), (other, _), (receiver, total) = cluster(3).run(differing, how)
    assert sender == receiver
    assert "rank 0 a message of (8, 4)" in sender
    assert "rank 2 a message of" in sender
    assert "from rank 0 to rank 2" in sender
    assert other == "has no part in it"
    assert total == 32


def unanswered(rank, size):
    calls.connect(timeout_s=4)
    said = []
    if rank == 0:
        for _ in range(2):
            try:
                calls.recv(torch.ones(3), 1)
            except distcomp.PeerLost as error:
                said.append(str(error))
    torch.distributed.barrier()
    calls.disconnect()
    return said


def test_a_message_that_never_comes_is_named_within_the_timeout(cluster):
    (once, again), nothing = cluster(2).run(unanswered)
    assert nothing == []
    assert "a message of (3,) of torch.float32 by identity from rank 1 to rank 0" in once
    assert "timeout_s=4" in once
    assert again == once


def refused(rank, size):
    x = torch.ones(6)
    attempts = {
        "not connected": lambda: calls.send(x, (rank + 1) % size),
        "itself": lambda: calls.send(x, rank),
        "no such rank": lambda: calls.recv(x, 7),
        "whole numbers": lambda: calls.send(
            torch.ones(3, dtype=torch.int64), (rank + 1) % size, "qsgd:bits=4"
        ),
        "sparse": lambda: calls.recv(x.to_sparse(), (rank + 1) % size),
        "exchange": lambda: calls.send(x, (rank + 1) % size, "powersgd"),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "not refused"
        except distcomp.DistcompError as error:
            found[name] = str(error)
    return found


def test_what_cannot_be_sent_is_refused_with_a_remedy(cluster):
    for found in cluster(3).run(refused):
        for name, said in found.items():
            assert ";" in said, (name, said)
        assert "connect" in found["not connected"]
