"""The lossless stage: another method's numbers to the bit, in fewer bytes, in lock-step and between
processes."""

from __future__ import annotations

import pytest
import torch

from distcomp.advice.predict import profile_method
from distcomp.collectives import AllGather, AllToAll
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods import Lossless, parse
from distcomp.methods.lossless import checked_size, is_coded, row_periods
from distcomp.payload import Part, Payload
from tests.buffers import draw, same_bits
from tests.lockstep import once

LARGE = Layout.of([("w", (300, 200)), ("b", (200,)), ("v", (64, 64))])
INNERS = (
    "qsgd:bits=2",
    "qsgd:bits=4",
    "mxfp4",
    "onebit",
    "natural",
    "topk:ratio=0.05",
    "powersgd",
    "terngrad",
    "bf16",
)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("coder", ["ans", "zstd"])
def test_the_numbers_are_inners_to_the_bit_and_its_bytes_no_more_than_declared(
    inner: str, coder: str, size: int
) -> None:
    if coder == "zstd":
        pytest.importorskip("zstandard", reason="zstandard is not installed (pip install 'distcomp[zstd]')")
    xs = draw(size, LARGE)
    method = parse(f"lossless:inner=({inner}),entropy={coder}")
    plain, coded = once(parse(inner), xs, LARGE), once(method, xs, LARGE)
    assert same_bits(plain.estimate, coded.estimate)
    for ours, theirs in zip(coded.contributions(), plain.contributions(), strict=True):
        assert same_bits(ours, theirs)
    assert sum(coded.sent_bytes) / size <= method.payload_bytes(LARGE, size, 0) + 8 * len(coded.asked)


@pytest.mark.parametrize(("inner", "most"), [("qsgd:bits=2", 0.65), ("qsgd:bits=4", 0.95)])
def test_fewer_bytes_are_sent_and_the_ledger_counts_those(inner: str, most: float) -> None:
    xs = draw(2, LARGE)
    plain, coded = once(parse(inner), xs, LARGE), once(parse(f"lossless:inner=({inner})"), xs, LARGE)
    assert sum(coded.sent_bytes) < most * sum(plain.sent_bytes)


def test_rows_repeat_after_the_bytes_of_a_row_whoever_sends_them() -> None:
    layout = Layout.of([("w", (64, 128)), ("conv", (32, 8, 3, 3)), ("b", (128,)), ("v", (600, 512))])
    values = layout.numel
    assert row_periods(layout, 4, values // 2) == (256, 64, 36)  # 4 bits, of all
    # 4 bits of one rank's share, or 1 of all; of one bit 72 values fill bytes, too
    assert set(row_periods(layout, 4, values // 8)) == {256, 64, 36, 16, 9}
    assert row_periods(layout, 4, 4 * values) == ()  # float32
    assert row_periods(Layout.of([("b", (128,))]), 2, 64) == ()


def divided_by_columns() -> float:
    """Bytes of a matrix whose columns have different sizes, over those of the same values as one row."""
    layout = Layout.of([("w", (1200, 128))])
    columns = torch.linspace(-2, 2, 128).exp().repeat(1200)
    xs = [x * columns for x in draw(2, layout)]
    as_one_row = Layout.of([("w", (1, layout.numel))], {"w": "matrix"})
    by_column, plain = (once(parse("lossless:inner=(qsgd:bits=4)"), xs, one) for one in (layout, as_one_row))
    return sum(by_column.sent_bytes) / sum(plain.sent_bytes)


def test_columns_of_different_sizes_make_a_tenth_fewer_bytes() -> None:
    assert divided_by_columns() < 0.9


def test_short_payloads_and_sums_go_as_they_are() -> None:
    small = Layout.of([("w", (20, 20))])
    xs = draw(2, small)
    plain, coded = (
        once(parse("qsgd:bits=4"), xs, small),
        once(parse("lossless:inner=(qsgd:bits=4)"), xs, small),
    )
    assert sum(coded.sent_bytes) == sum(plain.sent_bytes)
    xs = draw(2, LARGE)
    plain, coded = once(parse("bf16"), xs, LARGE), once(parse("lossless:inner=bf16"), xs, LARGE)
    assert sum(coded.sent_bytes) == sum(plain.sent_bytes)


def test_all_ranks_decide_alike_whether_a_request_is_coded() -> None:
    long, short = (Payload.empty((Part("codes", torch.uint8, numel),)) for numel in (5000, 10))
    for rank in range(2):
        assert is_coded(AllGather((long, short)[rank], parts=(long.parts, short.parts)), rank, 2)
        assert is_coded(AllToAll((long, short)), rank, 2)
        assert not is_coded(AllGather(short), rank, 2)


def test_a_payload_that_was_cut_or_is_of_another_coder_is_refused() -> None:
    payload = Payload.empty((Part("scales", torch.float32, 100), Part("codes", torch.uint8, 40_000)))
    payload.body.copy_(torch.arange(len(payload.body)) % 7)
    method = parse("lossless")
    assert isinstance(method, Lossless)
    coded = method._coded(payload, lambda nbytes: ())
    assert torch.equal(method._decoded(coded, payload.parts).body, payload.body)
    short = Payload.empty((Part("coded", torch.uint8, coded.body.numel() - 9),))
    short.body.copy_(coded.body[:-9])
    empty = Payload.empty((Part("coded", torch.uint8, 3),))
    for bad in (short, empty):
        with pytest.raises(DistcompError, match="one coder"):
            method._decoded(bad, payload.parts)
    with pytest.raises(DistcompError, match="ans or zstd"):
        parse("lossless:entropy=gzip")


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_it_is_profiled_where_ranks_are_not_alike(ranks: int) -> None:
    """Chunks of five ranks differ by a block: what others would send is made up, and must be readable."""
    for method in ("lossless:inner=(qsgd:bits=4)", "lossless:inner=(qsgd:bits=4,pattern=reduce_scatter)"):
        profiled = profile_method(method, (LARGE,), ranks)
        sent = sum(part.ask.sent_bytes(ranks) for part in profiled.profiles[0].rounds)
        assert 0 < sent <= parse(method).payload_bytes(LARGE, ranks, 0) * 1.05 + 500


@pytest.mark.parametrize("said", [-1, 10_000_000])
def test_a_size_that_cannot_be_is_refused(said: int) -> None:
    plain = (Part("codes", torch.uint8, 4096),)
    assert checked_size(4096, plain) == 4096
    with pytest.raises(DistcompError, match=r"where .* are the most; attach all ranks with one version"):
        checked_size(said, plain)
