"""What reaches outside its buffers is refused, in C as well as by the functions around it."""

from __future__ import annotations

import pytest
import torch

from distcomp.errors import DistcompError
from distcomp.kernels import binary, lowrank

_cpu = pytest.importorskip("distcomp.kernels._cpu")

A, B, RANK = 6, 40, 2
WIDE = 20_000


def product(kind: str, **changed: int) -> None:
    """A product of the right sizes, but for what is ``changed``."""
    p, q, m, out = (torch.zeros(size, dtype=torch.float32) for size in (RANK * A, RANK * B, A * B, 4 * A * B))
    given = {"a": A, "b": B, "rank": RANK, "p_stride": A, "stride": B, **changed}
    out_stride = changed.get("out_stride", {"rows": A, "columns": B, "outer": B}[kind])
    at = [one.data_ptr() for one in (p, q, m, out)]
    sizes = [one.numel() for one in (p, q, m, out)]
    numbers = [given[name] for name in ("a", "b", "rank", "p_stride", "stride")]
    _cpu.lowrank(kind, *at, *numbers, out_stride, False, tuple(sizes))


@pytest.mark.parametrize("kind", ["rows", "columns", "outer"])
def test_products_in_c_stay_inside_their_buffers(kind: str) -> None:
    product(kind)
    for changed in (
        {"a": A + 5 * A}, {"b": 5 * B}, {"b": WIDE}, {"rank": 9}, {"a": -1}, {"rank": -1}, {"b": -1},
        {"out_stride": -1}, {"out_stride": 1 << 62}, {"a": 1 << 62}, {"b": 1 << 62}, {"rank": 1 << 61},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="outside its buffers"):
            product(kind, **changed)
    with pytest.raises(ValueError, match="no product named"):
        _cpu.lowrank("other", 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, False, (1, 1, 1, 1))


def test_a_factor_of_another_width_is_refused() -> None:
    """A PowerSGD state of width 40 in a model of width 20,000."""
    q, p, matrix = torch.zeros(RANK, B), torch.zeros(RANK, A), torch.zeros(A, WIDE)
    for call in (
        lambda: lowrank.times_rows(q, matrix),
        lambda: lowrank.times_columns(torch.zeros(RANK, A + 1), matrix),
        lambda: lowrank.outer(p, q, matrix),
        lambda: lowrank.subtract_outer(p, q, matrix),
        lambda: lowrank.outer(p, torch.zeros(RANK + 1, WIDE), matrix),
    ):
        with pytest.raises(ValueError, match=r"does not fit a matrix|as many of both"):
            call()


def test_a_factor_of_another_type_is_not_read_as_float32() -> None:
    p, q = torch.ones(RANK, A), torch.ones(RANK, B, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        lowrank.subtract_outer(p, q, torch.zeros(A, B))


def test_numbers_that_cannot_be_are_refused_in_c() -> None:
    x = torch.zeros(64, dtype=torch.float32).data_ptr()
    keys = (1, 2, 3, 4, 5, 6)
    image, kernel = (3, 4, 4), (8, 3, 3, 1, 0)
    two, three, conv = (64, 64), (64, 64, 64), (48, 72, 8, 8, 32)
    for call in (
        lambda: _cpu.quantize(x, x, x, three, 8, 0, 4, 0, 0, False, 0, False),
        lambda: _cpu.quantize(x, x, x, three, 8, 8, 9, 0, 0, False, 0, False),
        lambda: _cpu.dequantize(x, x, x, three, 8, -8, 4, False, 1, 1.0),
        lambda: _cpu.dequantize(x, x, x, three, 8, 8, 0, False, 1, 1.0),
        lambda: _cpu.dequantize_pieces(x, x, x, three, x, -1, 8, 4, False, 1, 1.0, 0),
        lambda: _cpu.all_finite(x, -1, 0x7F800000),
        lambda: _cpu.checksum(x, -1),
        lambda: _cpu.write_header(x, -1, 0, 0, 0, True),
        lambda: _cpu.read_header(x, -1, 0, 0, 0),
        lambda: _cpu.permuted(x, 9, 8, 3, keys),
        lambda: _cpu.permuted(x, 2, 8, 64, keys),
        lambda: _cpu.permuted(x, 2, 9, 3, keys),
        lambda: _cpu.exponents(x, x, (-1, 64), 0, 0),
        lambda: _cpu.exponents(x, x, (9, 8), 0, 0),
        lambda: _cpu.scale_by_exponents(x, x, (64, -1)),
        lambda: _cpu.scale_by_exponents(x, x, (8, 9)),
        lambda: _cpu.pack_signs(x, x, two, -1, 1, 1, False),
        lambda: _cpu.pack_signs(x, x, two, 1, 1, 65, False),
        lambda: _cpu.pack_signs(x, x, (64, 1), 1, 1, 2, False),
        lambda: _cpu.pack_signs(x, x, two, 1 << 31, 1 << 31, 1 << 31, False),
        lambda: _cpu.binary_conv(x, x, x, x, x, conv, 1, image, (8, 3, 3, 0, 0), (2, 2), False, False),
        lambda: _cpu.binary_conv(x, x, x, x, x, conv, 1, image, kernel, (3, 2), False, False),
        lambda: _cpu.binary_conv(x, x, x, x, x, conv, 1, image, (8, 5, 3, 1, 0), (1, 1), False, False),
        lambda: _cpu.binary_conv(x, x, x, x, x, conv, -1, image, kernel, (2, 2), False, False),
        lambda: _cpu.binary_conv(x, x, x, x, x, conv, 1, (0, 4, 4), kernel, (2, 2), False, False),
        lambda: _cpu.binary_conv(x, x, x, x, x, conv, 4, image, kernel, (2, 2), False, False),
        lambda: _cpu.binary_conv(
            x, x, x, x, x, conv, 1, image, (2**31 - 1, 3, 3, 1, 0), (2, 2), False, False
        ),
        lambda: _cpu.binary_conv(x, x, x, x, x, conv, 1, (2**31 - 1, 4, 4), kernel, (2, 2), False, False),
        *(
            lambda short=short: _cpu.binary_conv(x, x, x, x, x, short, 1, image, kernel, (2, 2), False, False)
            for short in (
                (15, 72, 8, 8, 32),
                (16, 71, 8, 8, 32),
                (16, 72, 7, 8, 32),
                (16, 72, 8, 7, 32),
                (16, 72, 8, 8, 31),
            )
        ),
    ):
        with pytest.raises(ValueError, match="cannot be"):
            call()


def test_filters_of_another_shape_are_refused() -> None:
    words = binary.pack_filters(torch.ones(8, 3, 3, 3))
    scale, x = torch.ones(8), torch.ones(1, 3, 6, 6)
    binary.binary_conv2d(x, words, (8, 3, 3, 3), scale, scale)
    for changed in ((words, torch.ones(4)), (words[:, :4], scale), (words.int(), scale)):
        with pytest.raises(DistcompError, match="pack them with pack_filters"):
            binary.binary_conv2d(x, changed[0], (8, 3, 3, 3), changed[1], scale)
    with pytest.raises(DistcompError, match="pack them with pack_filters"):
        binary.binary_linear(torch.ones(2, 3), words, (8, 3, 1, 1), scale, scale)


def test_one_tensor_that_reaches_further_than_its_buffers_is_refused_in_c() -> None:
    """A tensor of 20 elements in blocks of 8: 3 scales; 4-bit codes take 4 + 4 + 2 bytes."""
    x, codes, scales = (torch.zeros(8 * size, dtype=torch.uint8) for size in (20, 10, 3))
    at = [one.data_ptr() for one in (x, codes, scales)]
    _cpu.quantize(*at, (20, 10, 3), 20, 8, 4, 0, 0, False, 0, False)
    _cpu.dequantize(*at, (20, 10, 3), 20, 8, 4, False, 0, 1.0)
    for sizes, numel in (
        ((19, 10, 3), 20), ((20, 9, 3), 20), ((20, 10, 2), 20), ((20, 10, 3), -1), ((20, 10, -3), 20),
        ((20, 10, 3), 2**63 - 1), ((2**63 - 1, 2**63 - 1, 2**63 - 1), 2**63 - 1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="outside its buffers"):
            _cpu.quantize(*at, sizes, numel, 8, 4, 0, 0, False, 0, False)
        with pytest.raises(ValueError, match="outside its buffers"):
            _cpu.dequantize(*at, sizes, numel, 8, 4, False, 0, 1.0)
