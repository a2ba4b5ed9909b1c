"""The kernels and codecs of :mod:`benchmarks.gpu`: bits against the reference, and bytes a second."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks._gpu_place import Place
from benchmarks.compressors import SUBJECTS
from distcomp import compressors, kernels
from distcomp.kernels import dispatch, minifloat, packing, reference
from distcomp.kernels.packing import Coding
from distcomp.layout import Layout
from distcomp.randomness import Key

SHOWN = 8
KEY = 2**63 + 5
AWKWARD = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-40, 2.0**-120, 3.4e38)

Found = Iterator[tuple[str, bool]]
"""What was compared, and whether all bits were equal."""


# -------------------------------------------------------------------------------------- against the reference


def kernels_part(place: Place) -> dict[str, Any]:
    """Every kernel of the Triton modules against its specification, and whole codecs against the CPU's."""
    try:
        from distcomp.kernels import triton
    except ImportError as error:
        if place.rehearsal:
            return {"ok": True, "skipped": f"Triton is not installed ({error}): pip install triton"}
        raise
    missing = set(triton.__all__) - set(CHECKS)
    if missing:
        raise SystemExit(f"nothing compares {', '.join(sorted(missing))}; add it to CHECKS")
    rows = {name: _compared(check(place)) for name, check in CHECKS.items()}
    codecs = dict(_codecs(place))
    ok = all(row["equal"] for row in rows.values()) and all(row["as close"] for row in codecs.values())
    return {"ok": ok, "kernels": rows, "codecs": codecs}


def _compared(found: Found) -> dict[str, Any]:
    """How many cases there were, and the first that differed; an error ends a check, not the others."""
    count, differ, begin_s = 0, [], time.perf_counter()
    try:
        for what, equal in found:
            count += 1
            differ += [] if equal else [what]
    except Exception as error:
        differ.append(f"after {count} cases {type(error).__name__}: {str(error)[:400]}")
    seconds = round(time.perf_counter() - begin_s, 2)
    return {"equal": not differ, "cases": count, "differ": differ[:SHOWN], "s": seconds}


def values(numel: int, seed: int = 0) -> Tensor:
    """Ordinary numbers, tiny ones, huge ones, and here and there an awkward one."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=draw)
    for at, factor in ((1, 1e-42), (2, 1e-36), (3, 1e30)):
        x[numel * at // 8 : numel * at // 8 + numel // 16] *= factor
    some = torch.randint(0, max(1, numel), (len(AWKWARD),), generator=draw)
    if numel:
        x[some] = torch.tensor(AWKWARD)
    return x


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit patterns, -0.0 and denormals included; which NaN a NaN is may differ."""
    a, b = a.cpu(), b.cpu()
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan].view(torch.int32), b[~nan].view(torch.int32))


def _codings() -> Iterator[tuple[int, Coding]]:
    """Every width with every way of rounding and of finding the scale."""
    for bits in range(1, 9):
        for norm in packing.NORMS:
            yield bits, Coding(True, norm, False)
        if bits > 1:
            yield bits, Coding(False, "max", False)
            yield bits, Coding(True, "max", True)


def _cases(place: Place) -> Iterator[tuple[int, int, int, Coding]]:
    """(elements, block, bits, coding): each coding on whole blocks and a short one; sizes about the edges;
    blocks of the fast path and of the general one, padded and not."""
    usual = Coding(True, "max", False)
    for bits, coding in _codings():
        yield (131 if place.rehearsal else 100_003), 64 if place.rehearsal else 512, bits, coding
    for bits in (1, 4, 7):
        for numel in (0, 1, 7, 511, 512, 513):
            yield numel, 512, bits, usual
        for block in (8, 104, 513):
            yield 2 * block + 5, block, bits, usual
    if not place.rehearsal:
        for block in (8192, 8200, 100_000):
            yield 3 * block + 1, block, 4, usual
        yield (1 << 23) + 77, 512, 4, usual


def _both(place: Place) -> Iterator[tuple[str, Any, Tensor, Tensor, Tensor, Tensor]]:
    """Each case: its words, the case, and codes and scales of the reference and of Triton's."""
    from distcomp.kernels import triton

    for number, case in enumerate(_cases(place)):
        numel, block, bits, coding = case
        x = values(numel, number)
        codes = torch.full((kernels.packed_bytes(numel, block, bits),), 0xA5, dtype=torch.uint8)
        scales = torch.rand(kernels.scale_count(numel, block), generator=torch.Generator().manual_seed(1))
        ours, our_scales = codes.to(place.device), scales.to(place.device)
        told = {"block": block, "bits": bits, "key": KEY, "first": 3 * block, "coding": coding}
        reference.quantize(x, codes, scales, **told)
        triton.quantize(x.to(place.device), ours, our_scales, **told)
        words = f"{numel} elements, block {block}, {bits} bits, {tuple(coding)}"
        yield words, case, codes, scales, ours, our_scales


def _quantize(place: Place) -> Found:
    for words, _, codes, scales, ours, our_scales in _both(place):
        yield words, torch.equal(ours.cpu(), codes) and same_bits(our_scales, scales)
    yield "beyond 2^31 elements", _far(place)


def _far(place: Place) -> bool:
    """The last blocks of a tensor whose elements no 32 bits count equal those blocks alone, where there is
    memory for one; a rehearsal, and a small GPU, take a short one."""
    from distcomp.kernels import triton

    blocks = 4
    if not place.rehearsal and torch.cuda.mem_get_info()[0] > 16 << 30:
        blocks = (1 << 31) // 512 + 4
    numel, tail = 512 * blocks, 1024
    x = torch.zeros(numel, device=place.device)
    x[-tail:] = values(tail).to(place.device)
    codes = torch.empty(numel // 2, dtype=torch.uint8, device=place.device)
    scales = torch.empty(blocks, device=place.device)
    coding = Coding(True, "max", False)
    triton.quantize(x, codes, scales, block=512, bits=4, key=KEY, first=0, coding=coding)
    wanted, wanted_scales = torch.empty(tail // 2, dtype=torch.uint8), torch.empty(2)
    told = {"block": 512, "bits": 4, "key": KEY, "first": numel - tail, "coding": coding}
    reference.quantize(x[-tail:].cpu(), wanted, wanted_scales, **told)
    return torch.equal(codes[-tail // 2 :].cpu(), wanted) and same_bits(scales[-2:], wanted_scales)


def _dequantize(place: Place) -> Found:
    from distcomp.kernels import triton

    for number, (words, case, codes, scales, _, _) in enumerate(_both(place)):
        numel, block, bits, coding = case
        for sign in (0, 1, -1) if bits in (1, 4) else ((0, 1, -1)[number % 3],):
            out = values(numel, 99)
            ours = out.to(place.device)
            told = {"block": block, "bits": bits, "powers": coding.powers, "sign": sign, "times": 1 / 3}
            reference.dequantize(codes, scales, out, **told)
            triton.dequantize(codes.to(place.device), scales.to(place.device), ours, **told)
            yield f"{words}, sign {sign}", same_bits(ours, out)


def _all_finite(place: Place) -> Found:
    from distcomp.kernels import triton

    for dtype in triton.INTEGERS:
        for numel in (0, 1, 2047, 2049, 5000 if place.rehearsal else 10_000_019):
            x = torch.full((numel,), -torch.finfo(dtype).max, dtype=dtype, device=place.device)
            yield f"{numel} of {dtype}", triton.all_finite(x)
            for at in {0, numel // 2, numel - 1} if numel else ():
                for bad in (float("nan"), float("inf"), -float("inf")):
                    kept, x[at] = x[at].clone(), bad
                    yield f"{bad} at {at} of {numel} of {dtype}", not triton.all_finite(x)
                    x[at] = kept


def _checksum(place: Place) -> Found:
    from distcomp.kernels import triton

    draw = torch.Generator().manual_seed(3)
    for size in (0, 1, 3, 4, 8191, 8193, 20_001 if place.rehearsal else 30_000_001):
        data = torch.randint(0, 256, (size,), generator=draw, dtype=torch.uint8)
        yield f"{size} bytes", triton.checksum(data.to(place.device)) == reference.checksum(data)


def _exponents(place: Place) -> Found:
    from distcomp.kernels import triton

    for numel in (0, 1, 1535, 3001 if place.rehearsal else 1_000_003):
        x = values(numel, 5)
        codes = torch.empty(numel, dtype=torch.uint8)
        ours = codes.to(place.device)
        reference.exponents(x, codes, key=KEY, first=96)
        triton.exponents(x.to(place.device), ours, key=KEY, first=96)
        yield f"{numel} elements", torch.equal(ours.cpu(), codes)


def _scale_by_exponents(place: Place) -> Found:
    from distcomp.kernels import triton

    codes = torch.arange(255, dtype=torch.uint8)
    for x in (torch.ones(255), values(255, 6)):
        ours = x.to(place.device)
        triton.scale_by_exponents(codes.to(place.device), ours)
        reference.scale_by_exponents(codes, x)
        yield "every exponent", same_bits(ours, x)


def _permuted(place: Place) -> Found:
    from distcomp.kernels import cpu, triton

    keys = tuple(range(11, 17))
    for count, numel in ((0, 1), (5, 5), (1000, 100_003)):
        ours, theirs = (one.permuted(count, numel, keys) for one in (triton, cpu))
        yield f"{count} of {numel}", torch.equal(ours, theirs)


def _minifloat(place: Place) -> Found:
    from distcomp.kernels import triton_minifloat

    for kind in (minifloat.E4M3, minifloat.E5M2, minifloat.E2M1):
        for key in (None, KEY):
            for numel in (0, 1, 31, 33, 3001 if place.rehearsal else 1_000_003):
                x = values(numel, 7)
                factors = torch.exp2(torch.arange(-(-numel // 32)).remainder(7).float() - 3)
                codes = torch.empty(kind.code_bytes(numel), dtype=torch.uint8)
                ours, there = codes.to(place.device), factors.to(place.device)
                minifloat.reference_encode(x, factors, codes, 32, kind, key, 96)
                triton_minifloat.encode(x.to(place.device), there, ours, 32, kind, key, 96)
                words = f"{numel} of {kind.name}, {'to nearest' if key is None else 'at random'}"
                yield f"{words}, codes", torch.equal(ours.cpu(), codes)
                for sign in (0, 1, -1):
                    out = values(numel, 8)
                    our_out = out.to(place.device)
                    minifloat.reference_decode(codes, factors, out, 32, kind, sign)
                    triton_minifloat.decode(ours, there, our_out, 32, kind, sign)
                    yield f"{words}, values, sign {sign}", same_bits(our_out, out)


CHECKS: dict[str, Callable[[Place], Found]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "all_finite": _all_finite,
    "checksum": _checksum,
    "exponents": _exponents,
    "scale_by_exponents": _scale_by_exponents,
    "permuted": _permuted,
    "minifloat": _minifloat,
}

CLOSE = 1e-5
"""How far what a GPU decodes may lie from what a CPU decodes, of the largest value, where products and sums
of many are rounded in another order."""


def _codecs(place: Place) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every codec's payload and what it decodes to, here and on the CPU by its own kernels."""
    layout = Layout.of([("weight", (96, 130)), ("bias", (77,))])
    x = torch.randn(layout.numel, generator=torch.Generator().manual_seed(9))
    key = Key.of("gpu")
    for name, codec in SUBJECTS.items():
        wanted = codec.encode(x, layout, key)
        out = torch.zeros_like(x)
        codec.decode_into(out, wanted, layout)
        with _by_triton(place):
            payload = codec.encode(x.to(place.device), layout, key)
            ours = torch.zeros_like(x, device=place.device)
            codec.decode_into(ours, payload, layout)
        differs = float((ours.cpu() - out).abs().max() / out.abs().max())
        equal = torch.equal(payload.body.cpu(), wanted.body)
        yield name, {"bytes equal": equal, "decoded differ by": differs, "as close": equal or differs < CLOSE}


@contextlib.contextmanager
def _by_triton(place: Place) -> Iterator[None]:
    """In a rehearsal tensors on the CPU go to Triton's interpreter, as on a GPU they go to Triton."""
    if not place.rehearsal:
        yield
        return
    before = os.environ.get("DISTCOMP_KERNELS")
    os.environ["DISTCOMP_KERNELS"] = "triton"
    dispatch.forced.cache_clear()
    try:
        yield
    finally:
        del os.environ["DISTCOMP_KERNELS"]
        if before is not None:
            os.environ["DISTCOMP_KERNELS"] = before
        dispatch.forced.cache_clear()


# ------------------------------------------------------------------------------------------ bytes by the seco

ENOUGH_S = 1.0
"""No more turns of a codec than fit in this."""


def bandwidth_part(place: Place) -> dict[str, Any]:
    """Encoding and decoding, in bytes read and written by the second, beside a copy of the same tensor."""
    side, turns = (64, 3) if place.rehearsal else (_side(), 30)
    draw = torch.Generator().manual_seed(place.seed)
    x = torch.randn(side, side, generator=draw).to(place.device)
    out, clock = torch.empty_like(x), Clock(place)
    copy_s = clock.median_s(lambda: out.copy_(x), turns)
    copy_bytes = 2 * x.numel() * x.element_size()
    rows: dict[str, Any] = {}
    for name, codec in SUBJECTS.items():
        try:
            rows[name] = _row(codec, x, out, clock, turns, copy_s)
        except Exception as error:
            rows[name] = {"failed": f"{type(error).__name__}: {str(error)[:400]}"}
    return {
        "ok": not any("failed" in row for row in rows.values()),
        "elements": x.numel(),
        "copy": {"s": copy_s, "tb_s": copy_bytes / copy_s / 1e12},
        "written between calls bytes": clock.evict.numel() * 4,
        "rows": rows,
    }


def _side() -> int:
    """Of the matrix: 268 MB of float32, or 67 MB where there is little memory."""
    return 8192 if torch.cuda.mem_get_info()[0] > 24 << 30 else 4096


def _row(
    codec: compressors.Compressor, x: Tensor, out: Tensor, clock: Clock, turns: int, copy_s: float
) -> dict[str, Any]:
    key, layout = Key.of("gpu"), Layout.of([("weight", tuple(x.shape))])
    x, out = x.view(-1), out.view(-1)
    payload = codec.encode(x, layout, key)
    nbytes = x.numel() * x.element_size() + payload.body.numel()
    steps = {
        "encode": lambda: codec.encode(x, layout, key),
        "decode": lambda: codec.decode_into(out, payload, layout),
    }
    row: dict[str, Any] = {"payload bytes": payload.body.numel()}
    for name, step in steps.items():
        step_s = clock.median_s(step, turns)
        row[name] = {"s": step_s, "tb_s": nbytes / step_s / 1e12, "copies": step_s / copy_s}
    return row


class Clock:
    """Times calls whose tensors are in no cache: before each, memory of several times the largest is written.

    On a GPU by its own events: from the first kernel's turn to the last one's end, and what the host lets it
    wait in between; on a CPU by the clock.
    """

    def __init__(self, place: Place) -> None:
        self.on_gpu = not place.rehearsal
        cache = torch.cuda.get_device_properties(0).L2_cache_size if self.on_gpu else 1 << 20
        self.evict = torch.zeros(cache, device=place.device)  # four bytes each

    def median_s(self, step: Callable[[], object], turns: int) -> float:
        """Over turns, after three that warm it up."""
        for _ in range(3):
            step()
        taken: list[float] = []
        end_s = time.perf_counter() + ENOUGH_S
        while len(taken) < 3 or (len(taken) < turns and time.perf_counter() < end_s):
            self.evict.add_(1)
            taken.append(self._on_gpu_s(step) if self.on_gpu else self._on_cpu_s(step))
        return statistics.median(taken)

    def _on_gpu_s(self, step: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def _on_cpu_s(self, step: Callable[[], object]) -> float:
        begin_s = time.perf_counter()
        step()
        return time.perf_counter() - begin_s
