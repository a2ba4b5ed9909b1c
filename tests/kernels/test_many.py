"""Many pieces in one call: the same bytes as one call for each, and no more calls for more names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distcomp.compressors import Compressor, NonUniform, Quantize, TopK
from distcomp.compressors.sparse import rows_of
from distcomp.errors import DistcompError
from distcomp.kernels import _cpu, dispatch
from distcomp.kernels import pieces as many
from distcomp.kernels.pieces import Moves, Pieces, move
from distcomp.layout import Layout
from distcomp.methods import StepContext, parse
from distcomp.randomness import Key
from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.lockstep import Lockstep
from tests.kernels.draws import same_bits

KEY = Key.of("many")
SIZES = st.lists(st.integers(0, 90), min_size=1, max_size=12)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many for as long as it lasts."""
    usual = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def laid_out(sizes: list[int]) -> Layout:
    """Parameters of these sizes, every third a bias."""
    shapes = [(f"p{i}", (size,) if i % 3 == 2 else (1, size)) for i, size in enumerate(sizes)]
    return Layout.of(shapes)


def drawn(numel: int) -> torch.Tensor:
    """Values with ties, zeros and what is not finite."""
    x = torch.randint(-9, 10, (numel,), generator=torch.Generator().manual_seed(numel)).float()
    x[::7] = 0.0
    if numel > 20:
        x[11], x[13] = float("nan"), float("-inf")
    return x


@settings(deadline=None)
@given(
    sizes=SIZES, bits=st.integers(1, 8), block=st.sampled_from([1, 8, 13, 64]), nearest=st.booleans(),
    norm=st.sampled_from(["max", "l2"]),
)  # fmt: skip
def test_pieces_quantize_to_the_bytes_of_each_alone(monkeypatch_context, sizes, bits, block, nearest, norm):
    layout, x = laid_out(sizes), drawn(sum(sizes))
    compressor = Quantize(bits, block, norm, "nearest" if nearest else "stochastic", ("bias",))
    compiled = compressor.encode(x, layout, KEY)
    for add in (False, True):
        out, plain_out = torch.ones_like(x), torch.ones_like(x)
        compressor.decode_into(out, compiled, layout, add=add)
        with monkeypatch_context() as patch:
            patch.setattr(dispatch, "forced", lambda: "reference")
            reference = compressor.encode(x, layout, KEY)
            compressor.decode_into(plain_out, reference, layout, add=add)
        assert torch.equal(compiled.body, reference.body)
        assert torch.equal(out.isnan(), plain_out.isnan())
        assert torch.equal(out.nan_to_num(), plain_out.nan_to_num())


@settings(deadline=None)
@given(
    sizes=SIZES,
    bits=st.integers(1, 8),
    kind=st.sampled_from(["max", "l2", "nearest", "powers", "plain"]),
    large=st.booleans(),
)
def test_a_step_of_error_feedback_is_its_three_steps(monkeypatch_context, sizes, bits, kind, large) -> None:
    layout, x = laid_out(sizes), drawn(sum(sizes))
    residual = torch.randn(len(x), generator=torch.Generator().manual_seed(1))
    if kind == "powers":
        compressor = NonUniform(max(2, bits), 16)
    else:
        norm, rounding = ("l2" if kind == "l2" else "max"), ("nearest" if kind == "nearest" else "stochastic")
        compressor = Quantize(bits, 16, norm, rounding, ("bias",) if kind == "plain" else ())
    owed, left = torch.empty_like(x), torch.empty_like(x)
    wanted = Compressor.encode_owing(compressor, x, residual, owed, layout, KEY)
    with monkeypatch_context() as patch, threads(2 if large else 1):  # one alone does all in one call
        patch.setattr(many, "LARGE", 8 if large else many.LARGE)
        laid_anew = laid_out(sizes)
        payload = compressor.encode_owing(x, residual, left, laid_anew, KEY)
    assert torch.equal(payload.body, wanted.body)
    assert same_bits(left, owed)


@pytest.mark.parametrize("count", [1, 2])
def test_threads_share_large_pieces_and_change_no_byte(monkeypatch, count) -> None:
    layout, x = laid_out([5, many.LARGE + 3, 70, many.LARGE + 1]), drawn(2 * many.LARGE + 79)
    pieces, _ = Quantize(4, 16)._pieces(layout)
    calls: list[int] = []
    own = _cpu.quantize_pieces
    monkeypatch.setattr(_cpu, "quantize_pieces", lambda *all: (calls.append(all[5]), own(*all)))
    codes, scales = torch.empty(pieces.code_bytes, dtype=torch.uint8), torch.empty(pieces.scale_count)
    with threads(count):
        many.quantize(x, codes, scales, pieces, [1, 2, 3, 4])
    assert pieces.lines.owners == (0, 1, 1, 2, 3, 3)
    assert sorted(calls) == ([6] if count == 1 else [2, 4])
    expected = torch.empty_like(codes), torch.empty_like(scales)
    monkeypatch.setattr(dispatch, "forced", lambda: "reference")
    many.quantize(x, *expected, pieces, [1, 2, 3, 4])
    assert torch.equal(codes, expected[0])
    assert same_bits(scales, expected[1])


@settings(deadline=None)
@example(sizes=[5, 40, 9], compressor=Quantize(7, 16, plain=("bias",)), ranks=3, own=True, large=False)
@given(
    sizes=SIZES,
    compressor=st.sampled_from(
        [Quantize(1, 16), Quantize(4, 13), Quantize(7, 16, plain=("bias",)), NonUniform(3, 16)]
    ),
    ranks=st.integers(1, 4),
    own=st.booleans(),
    large=st.booleans(),
)
def test_the_mean_in_one_pass_is_sums_in_rank_order(
    monkeypatch_context, sizes, compressor, ranks, own, large
):
    layout, tensors = laid_out(sizes), [drawn(sum(sizes)) * (1 + rank) for rank in range(ranks)]
    payloads = [compressor.encode(x.nan_to_num(), layout, KEY.fold(i)) for i, x in enumerate(tensors)]
    as_it_is = (ranks - 1, tensors[-1]) if own else None
    wanted, got = torch.empty_like(tensors[0]), torch.empty_like(tensors[0])
    Compressor.mean_into(compressor, wanted, payloads, layout, as_it_is)
    with monkeypatch_context() as patch, threads(2 if large else 1):
        patch.setattr(many, "LARGE", 8 if large else many.LARGE)
        compressor.mean_into(got, payloads, laid_out(sizes), as_it_is)
    assert same_bits(got, wanted)
    with monkeypatch_context() as patch:
        patch.setattr(dispatch, "forced", lambda: "reference")
        compressor.mean_into(got, payloads, layout, as_it_is)
    assert same_bits(got, wanted)


def test_the_mean_reads_and_writes_nothing_that_is_not_its_own() -> None:
    pieces = Pieces.of([(0, 40, 0)], 16, 4)
    coded = torch.zeros(pieces.code_bytes, dtype=torch.uint8), torch.zeros(pieces.scale_count)
    with pytest.raises(DistcompError, match="values have 39 elements"):
        many.dequantize_mean([coded], torch.empty(39), pieces)
    with pytest.raises(DistcompError, match="own values have 39 elements"):
        many.dequantize_mean([coded], torch.empty(40), pieces, own=(0, torch.empty(39)))
    for short in ((coded[0][:-1], coded[1]), (coded[0], coded[1][:-1])):
        with pytest.raises(DistcompError, match="pass a contiguous tensor of that size"):
            many.dequantize_mean([coded, short], torch.empty(40), pieces)
    table = torch.tensor([[0, 40, 0, 0, 0]]).data_ptr()
    with pytest.raises(ValueError, match="the mean of nothing"):
        _cpu.dequantize_mean(0, 0, 0, (40, 20, 3), table, 1, 16, 4, False, 1.0)
    for sizes in ((39, 20, 3), (40, 19, 3), (40, 20, 2)):
        with pytest.raises(ValueError, match="piece 0"):
            _cpu.dequantize_mean(0, 0, 1, sizes, table, 1, 16, 4, False, 1.0)


@settings(deadline=None)
@given(
    sizes=SIZES,
    ratio=st.sampled_from([0.01, 0.1, 0.34, 0.6, 0.97, 1.0]),
    chunk=st.sampled_from([0, 1, 7, 64]),
)
def test_rows_are_chosen_and_written_as_torch_does_it(monkeypatch_context, sizes, ratio, chunk):
    layout, x = laid_out(sizes), drawn(sum(sizes))
    rows = rows_of(layout, ratio, chunk)
    noise = torch.randint(0, 256, (rows.code_bytes,), dtype=torch.uint8)
    compiled = rows.largest(x), rows.encode(rows.largest(x)), rows.decode(noise)
    with monkeypatch_context() as patch:
        patch.setattr(dispatch, "forced", lambda: "reference")
        reference = rows.largest(x), rows.encode(rows.largest(x)), rows.decode(noise)
    for ours, theirs in zip(compiled, reference, strict=True):
        assert ours.tolist() == theirs.tolist()
    assert rows.decode(compiled[1]).tolist() == compiled[0].tolist()


@pytest.mark.parametrize("length", [300, 5000, 2**16 + 50])
def test_a_long_row_among_short_ones_is_chosen_and_written_as_torch_does_it(monkeypatch, length):
    layout = laid_out([3, length, 64, length])
    x = torch.randn(layout.numel, generator=torch.Generator().manual_seed(1))
    compressor = TopK(0.01)
    compiled = compressor.encode(x, layout, KEY)
    found = compressor.positions(compiled, layout)
    monkeypatch.setattr(dispatch, "forced", lambda: "reference")
    assert torch.equal(compiled.body, compressor.encode(x, layout, KEY).body)
    assert torch.equal(found, compressor.positions(compiled, layout))


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_moves_go_there_and_back(monkeypatch, name):
    monkeypatch.setattr(dispatch, "forced", lambda: name)
    x, out, again = torch.arange(10.0), torch.zeros(6), torch.full((10,), -1.0)
    moves = Moves(((7, 0, 2), (9, 2, 1), (2, 4, 0), (0, 3, 3)))
    move(x, out, moves)
    assert out.tolist() == [7, 8, 9, 0, 1, 2]
    assert len(moves.table) == 2, "neighbours are one move, and what is empty is none"
    move(out, again, moves.back)
    assert again.tolist() == [0, 1, 2, -1, -1, -1, -1, 7, 8, 9]


def test_what_does_not_fit_is_refused():
    pieces = Pieces.of([(0, 10, 0), (10, 6, 0)], 8, 4)
    x, codes, scales = torch.zeros(16), torch.zeros(pieces.code_bytes, dtype=torch.uint8), torch.zeros(3)
    for wrong in ((x[:15], codes, scales), (x, codes[:-1], scales), (x, codes, scales[:2])):
        with pytest.raises(DistcompError, match="are needed"):
            many.quantize(*wrong, pieces)
    with pytest.raises(DistcompError, match="one for each"):
        many.quantize(x, codes, scales, pieces, [1])
    with pytest.raises(DistcompError, match="target's values of a move"):
        move(x, torch.zeros(3), Moves(((0, 0, 4),)))
    with pytest.raises(DistcompError, match="multiple of block"):
        Pieces.of([(0, 10, 3)], 8, 4)


KERNELS = [name for name in dir(_cpu) if not name.startswith("_")]


@pytest.mark.parametrize("method", ["qsgd:bits=4", "qsgd:bits=1", "powersgd", "topk:ratio=0.01"])
def test_more_names_are_no_more_calls(monkeypatch, method):
    """The kernels are called as often for 60 matrices as for 6 (once for each shape's QR)."""

    def calls(matrices: int) -> int:
        layout = Layout.of(
            [(f"{i}.{what}", shape) for i in range(matrices) for what, shape in SMALL_LAYER.items()]
        )
        chosen, count = parse(method), 0

        def counted(real):
            def call(*arguments):
                nonlocal count
                count += 1
                return real(*arguments)

            return call

        xs = [torch.randn(layout.numel, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
        states = [chosen.init(layout) for _ in xs]
        for step in range(2):
            contexts = [StepContext(rank, 2, layout, step, Key.of(step)) for rank in range(2)]
            round_ = [Aggregation(chosen, *each) for each in zip(xs, states, contexts, strict=True)]
            with monkeypatch.context() as patch:
                if step:
                    for name in KERNELS:
                        patch.setattr(_cpu, name, counted(getattr(_cpu, name)))
                    patch.setattr(torch.linalg, "qr", counted(torch.linalg.qr))
                Lockstep(2).run(round_)
            states = [one.finished().state for one in round_]
        return count

    few = calls(6)
    assert 0 < few == calls(60)


SMALL_LAYER = {"weight": (16, 20), "bias": (16,)}


@pytest.fixture(scope="module")
def monkeypatch_context():
    """As ``monkeypatch.context``, for each example that is drawn."""
    return pytest.MonkeyPatch.context
