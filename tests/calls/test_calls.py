"""Every call, dtype and shape, on 1 to 4 processes, against torch.distributed's own."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import distcomp
from distcomp import calls

SHAPES = [(), (0,), (33, 5), (3, 0, 2)]
DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64,
    torch.int64, torch.int32, torch.uint8, torch.bool,
]  # fmt: skip


def own(rank, shape, dtype, seed=0):
    """A rank's tensor: multiples of 1/8, or whole numbers, whose sums are exact in every order."""
    generator = torch.Generator().manual_seed(100 * rank + seed)
    whole = torch.randint(0, 16, shape, generator=generator)
    if dtype.is_complex:
        return torch.complex(whole / 8, torch.randint(-8, 8, shape, generator=generator) / 8).to(dtype)
    return (whole / 8 - 1).to(dtype) if dtype.is_floating_point else whole.to(dtype)


def exact(rank, size, group=None, dtypes=DTYPES):
    """Of each call, shape and dtype: does ``identity`` give what torch.distributed gives, bit for bit?"""
    found = []
    for dtype in dtypes:
        for shape in SHAPES:
            everyone = [own(other, shape, dtype) for other in range(size)]
            found += [(name, dtype, shape) for name in wrong(rank, size, everyone, group)]
    calls.disconnect(group)
    return found


def wrong(rank, size, everyone, group=None):
    """The names of the calls whose answer is another than it should be."""
    mine, answers, shape = everyone[rank], {}, everyone[rank].shape
    if mine.dtype != torch.bool:
        total = mine.clone()
        calls.all_reduce(total, group=group)
        answers["all_reduce"] = (total, torch.stack(everyone).sum(0, dtype=mine.dtype))
        piece = torch.empty_like(mine)
        calls.reduce_scatter(piece, [mine] * size, group=group)
        answers["reduce_scatter"] = (piece, torch.stack(everyone).sum(0, dtype=mine.dtype))
    gathered = [torch.empty_like(mine) for _ in range(size)]
    calls.all_gather(gathered, mine, group=group)
    answers["all_gather"] = (torch.stack(gathered), torch.stack(everyone))
    together = mine.new_empty((size * shape[0], *shape[1:])) if shape else mine.new_empty(size)
    calls.all_gather(together, mine, group=group)
    answers["all_gather, one tensor"] = (together.view(size, *shape), torch.stack(everyone))
    routed = [torch.empty_like(mine) for _ in range(size)]
    calls.all_to_all(routed, [mine] * size, group=group)
    answers["all_to_all"] = (torch.stack(routed), torch.stack(everyone))
    told = mine.clone()
    calls.broadcast(told, size - 1, group=group)
    answers["broadcast"] = (told, everyone[-1])
    return [name for name, (got, wanted) in answers.items() if not torch.equal(got, wanted)]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_identity_is_torch_distributeds_answer_bit_for_bit(cluster, size):
    assert cluster(size).run(exact) == [[]] * size


CODECS = ["qsgd:bits=8", "qsgd:bits=4", "bf16", "quantize:bits=8,norm=l2", "topk:ratio=0.5"]


def lossy(rank, size, codec, dtype, shape, group=None):
    """Each call's answer by a codec, and what torch.distributed's own would be."""
    everyone = [own(other, shape, dtype) for other in range(size)]
    mine = everyone[rank]
    total = mine.clone()
    calls.all_reduce(total, codec, group=group)
    mean = mine.clone()
    calls.all_reduce(mean, codec, op="mean", group=group)
    piece = torch.empty_like(mine)
    calls.reduce_scatter(piece, [own(rank, shape, dtype, place) for place in range(size)], codec, group=group)
    gathered = [torch.empty_like(mine) for _ in range(size)]
    calls.all_gather(gathered, mine, codec, group=group)
    routed = [torch.empty_like(mine) for _ in range(size)]
    calls.all_to_all(routed, [own(rank, shape, dtype, place) for place in range(size)], codec, group=group)
    told = mine.clone()
    calls.broadcast(told, 0, codec, group=group)
    sent = calls.sent_bytes(group)
    calls.disconnect(group)
    pieces = torch.stack([own(other, shape, dtype, rank) for other in range(size)])
    answers = {
        "all_reduce": (total, torch.stack(everyone).sum(0)),
        "mean": (mean, torch.stack(everyone).sum(0) / size),
        "reduce_scatter": (piece, pieces.sum(0)),
        "all_gather": (torch.stack(gathered), torch.stack(everyone)),
        "all_to_all": (torch.stack(routed), pieces),
        "broadcast": (told, everyone[0]),
    }
    return answers, sent


SAMPLES = [(torch.float32, (40, 30)), (torch.bfloat16, (513,)), (torch.complex64, (9, 7))]


def beyond(answers):
    """The calls whose answers are further off than a codec may be, or of another type."""
    found = []
    for name, (got, wanted) in answers.items():
        error = (got - wanted).abs().double().pow(2).sum() / wanted.abs().double().pow(2).sum()
        # Two roundings to 4 bits are the worst here; a wrong sum is above 0.5.
        found += [(name, float(error))] * (not error < 0.4 or got.dtype != wanted.dtype)
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("codec", CODECS)
def test_a_codec_errs_by_its_own_bound(cluster, size, codec):
    for dtype, shape in SAMPLES:
        ranks = cluster(size).run(lossy, codec, dtype, shape)
        for answers, _ in ranks:
            assert beyond(answers) == []
        for name in ("all_reduce", "mean", "all_gather", "broadcast"):  # the same bits on every rank
            assert all(torch.equal(answers[name][0], ranks[0][0][name][0]) for answers, _ in ranks), name


@pytest.mark.parametrize("codec", ["qsgd:bits=4", "bf16"])
def test_bytes_are_those_of_the_codec(cluster, codec):
    (_, four), (_, _) = cluster(2).run(lossy, codec, torch.float32, (64, 512))
    (_, plain), (_, _) = cluster(2).run(lossy, "identity", torch.float32, (64, 512))
    ratio = {"qsgd:bits=4": 4.125 / 32, "bf16": 0.5}[codec]
    kinds = set(plain) - {"header", "digest"}
    assert sum(plain[kind] for kind in kinds) > 5 * 64 * 512 * 4
    body = sum(four[kind] for kind in set(four) - {"header", "digest"})
    assert body / sum(plain[kind] for kind in kinds) == pytest.approx(ratio, rel=0.02)


def unbiased(rank, size):
    """The mean of many roundings, over calls: their noise must not repeat itself."""
    x = torch.linspace(-1, 1, 512, dtype=torch.float32) + rank
    sums = torch.zeros(512, dtype=torch.float64)
    for _ in range(400):
        total = x.clone()
        calls.all_reduce(total, "qsgd:bits=2")
        sums += total.double()
    calls.disconnect()
    return (sums / 400 - 2 * torch.linspace(-1, 1, 512) - 1).abs().max().item()


def test_many_calls_average_to_the_truth(cluster):
    for worst in cluster(2).run(unbiased):
        assert worst < 0.35  # a rounding is up to 2 wrong; 400 of them, by 4 standard errors


def alike(rank, size):
    """What came of one tensor that every rank sends."""
    x = torch.linspace(-1, 1, 1024, dtype=torch.float32)
    gathered, routed = [x.clone() for _ in range(size)], [x.clone() for _ in range(size)]
    calls.all_gather(gathered, x, "qsgd:bits=2")
    calls.all_to_all(routed, [x] * size, "qsgd:bits=2")
    calls.disconnect()
    return torch.equal(*gathered), torch.equal(*routed)


def test_ranks_round_each_by_numbers_of_their_own(cluster):
    assert cluster(2).run(alike) == [(False, False)] * 2


def uneven(rank, size, codec, group=None):
    """Rank j is sent ``(rank + j) % 3`` rows."""
    inputs = [torch.full(((rank + to) % 3, 5), 10.0 * rank + to, dtype=torch.float32) for to in range(size)]
    outputs = [torch.empty((source + rank) % 3, 5, dtype=torch.float32) for source in range(size)]
    calls.all_to_all(outputs, inputs, codec, group=group)
    calls.disconnect(group)
    return [output.tolist() for output in outputs]


@pytest.mark.parametrize("codec", ["identity", "qsgd:bits=8"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_rows_of_any_number_are_routed(cluster, size, codec):
    for rank, outputs in enumerate(cluster(size).run(uneven, codec)):
        for source, rows in enumerate(outputs):
            wanted = torch.full(((source + rank) % 3, 5), 10.0 * source + rank)
            assert torch.allclose(torch.tensor(rows).view(wanted.shape), wanted, rtol=0.02)


def overlapped(rank, size):
    """Three calls under way at once, waited for out of order."""
    tensors = [own(rank, (100, 10), torch.float32, seed) for seed in range(3)]
    works = [calls.all_reduce(tensor, async_op=True) for tensor in tensors]
    for work in reversed(works):
        work.wait()
        work.wait()  # once more changes nothing
    calls.disconnect()
    return [
        torch.equal(tensor, sum(own(other, (100, 10), torch.float32, seed) for other in range(size)))
        for seed, tensor in enumerate(tensors)
    ]


def test_calls_are_under_way_together(cluster):
    assert cluster(3).run(overlapped) == [[True] * 3] * 3


def with_nan(rank, size, codec):
    tensor = own(rank, (50,), torch.float32)
    if rank == 1:
        tensor[3] = float("nan")
    calls.all_reduce(tensor, codec)
    clean = own(rank, (50,), torch.float32)
    calls.all_reduce(clean, codec)
    calls.disconnect()
    return tensor.isnan().sum().item(), clean.isfinite().all().item()


@pytest.mark.parametrize(("codec", "count"), [("qsgd:bits=4", 50), ("topk:ratio=0.1", 50), ("identity", 1)])
def test_a_nan_reaches_every_rank_and_leaves_no_trace(cluster, codec, count):
    assert cluster(2).run(with_nan, codec) == [(count, True)] * 2


def differing(rank, size, how, group=None):
    x = torch.ones(8, 4, dtype=torch.float32)
    try:
        if how == "shape":
            calls.all_reduce(x[rank:], "qsgd:bits=4", group=group)
        elif how == "codec":
            codec = ["qsgd:bits=4", "qsgd:bits=8"][rank % 2]
            calls.all_gather([x.clone() for _ in range(size)], x, codec, group=group)
        elif how == "call":
            calls.broadcast(x, 0, group=group) if rank else calls.all_reduce(x, group=group)
        else:
            inputs = [x[: 1 + to] for to in range(size)]
            outputs = [x.new_empty((1 + rank + (rank == 1), 4)) for _ in range(size)]
            calls.all_to_all(outputs, inputs, group=group)
        said = "not noticed"
    except distcomp.Mismatch as error:
        said = str(error)
    total = torch.ones(3, dtype=torch.float32)
    calls.all_reduce(total, group=group)  # the line goes on
    calls.disconnect(group)
    return said, total.tolist()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("how", ["shape", "codec", "call", "sizes"])
def test_what_differs_is_named_on_every_rank(cluster, size, how):
    answers = cluster(size).run(differing, how)
    sentences = {said for said, _ in answers}
    assert len(sentences) == 1
    assert "rank 0" in sentences.pop()
    assert all(total == [size] * 3 for _, total in answers)


def absent(rank, size):
    calls.connect(timeout_s=4)
    if rank == 1:
        calls.disconnect()
        return "left"
    try:
        calls.all_reduce(torch.ones(3, dtype=torch.float32))
    except distcomp.PeerLost as error:
        said = str(error)
    else:
        said = "not noticed"
    try:
        calls.all_reduce(torch.ones(3, dtype=torch.float32))
    except distcomp.PeerLost as error:
        again = str(error)
    calls.disconnect()
    return said, again


def test_a_rank_that_leaves_is_named_and_no_later_call_waits_for_it(cluster):
    (said, again), left = cluster(2).run(absent)
    assert left == "left"
    assert "rank 1" in said
    assert again == said


def in_a_group(rank, size):
    """Ranks 1 and 3 among themselves, while 0 and 2 do something else."""
    pair = dist.new_group([1, 3])
    found = None
    if rank in (1, 3):
        x = torch.full((4,), float(rank), dtype=torch.float32)
        calls.broadcast(x, 3, "bf16", group=pair)
        total = torch.full((4,), float(rank), dtype=torch.float32)
        calls.all_reduce(total, group=pair)
        found = x.tolist(), total.tolist()
        calls.disconnect(pair)
    else:
        with pytest.raises(distcomp.DistcompError, match="none of the group's"):
            calls.broadcast(torch.ones(3), 3, group=pair)
    dist.barrier()
    return found


def test_a_group_of_some_ranks_calls_by_itself(cluster):
    answers = cluster(4).run(in_a_group)
    assert answers == [None, ([3.0] * 4, [4.0] * 4), None, ([3.0] * 4, [4.0] * 4)]


def in_a_chain(rank, size):
    """Pairs of neighbours: the rank in the middle is in one more group than each of the others."""
    pairs, found = [dist.new_group(pair) for pair in ([0, 1], [1, 2])], []
    for pair, ranks in zip(pairs, ([0, 1], [1, 2]), strict=True):
        if rank in ranks:
            calls.connect(pair, timeout_s=10)
            x = torch.full((4,), float(rank), dtype=torch.float32)
            calls.all_reduce(x, group=pair)
            found.append(x[0].item())
    for pair, ranks in zip(pairs, ([0, 1], [1, 2]), strict=True):
        calls.disconnect(pair) if rank in ranks else None
    return found


def test_ranks_in_other_numbers_of_groups_call_each_other(cluster):
    assert cluster(3).run(in_a_chain) == [[1.0], [1.0, 3.0], [3.0]]


def refused(rank, size):
    x = torch.ones(6, dtype=torch.float32)
    attempts = {
        "whole numbers": lambda: calls.all_reduce(torch.ones(3, dtype=torch.int64), "qsgd:bits=4"),
        "mean of whole": lambda: calls.all_reduce(torch.ones(3, dtype=torch.int64), op="mean"),
        "op": lambda: calls.all_reduce(x, op="max"),
        "sparse": lambda: calls.all_reduce(x.to_sparse()),
        "averaging": lambda: calls.all_reduce(x, "diloco"),
        "exchange": lambda: calls.all_gather([x, x], x, "powersgd"),
        "pieces": lambda: calls.all_gather([x], x),
        "shapes": lambda: calls.reduce_scatter(x, [x, x[:3]]),
        "one tensor": lambda: calls.reduce_scatter(x, torch.ones(7, dtype=torch.float32)),
        "counts": lambda: calls.all_to_all([x], [x, x]),
        "dtypes": lambda: calls.all_to_all([x, x], [x, x.double()]),
        "source": lambda: calls.broadcast(x, 7),
        "timeout": lambda: (calls.connect(timeout_s=30), calls.connect(timeout_s=31)),
        "rows": lambda: calls.route_rows(x.view(3, 2), [1, 1], [1, 1]),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "not refused"
        except distcomp.DistcompError as error:
            found[name] = str(error)
    calls.disconnect()
    return found


def test_what_cannot_be_sent_is_refused_with_a_remedy(cluster):
    for found in cluster(2).run(refused):
        for name, said in found.items():
            assert said != "not refused", name
            assert any(sign in said for sign in (";", "use ")), (name, said)
