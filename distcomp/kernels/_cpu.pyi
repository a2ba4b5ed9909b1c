Coded = tuple[int, int, int]
"""Sizes in elements: of values, codes and scales."""
Four = tuple[int, int, int, int]
"""Of values, codes, scales of blocks and scales of groups: where they are, or how many elements."""

def quantize(
    x: int,
    codes: int,
    scales: int,
    sizes: Coded,
    numel: int,
    block: int,
    bits: int,
    key: int,
    first: int,
    stochastic: bool,
    norm: int,
    powers: bool,
    /,
) -> None: ...
def dequantize(
    out: int,
    codes: int,
    scales: int,
    sizes: Coded,
    numel: int,
    block: int,
    bits: int,
    powers: bool,
    sign: int,
    times: float,
    /,
) -> None: ...
def quantize_pieces(
    x: int,
    codes: int,
    scales: int,
    sizes: Coded,
    table: int,
    pieces: int,
    keys: int,
    block: int,
    bits: int,
    stochastic: bool,
    norm: int,
    powers: bool,
    owing: tuple[int, int],
    /,
) -> None: ...
def dequantize_pieces(
    out: int,
    codes: int,
    scales: int,
    sizes: Coded,
    table: int,
    pieces: int,
    block: int,
    bits: int,
    powers: bool,
    sign: int,
    times: float,
    base: int,
    /,
) -> None: ...
def dequantize_mean(
    out: int,
    sources: int,
    count: int,
    sizes: Coded,
    table: int,
    pieces: int,
    block: int,
    bits: int,
    powers: bool,
    times: float,
    /,
) -> None: ...
def top_rows(x: int, places: int, sizes: tuple[int, int], table: int, rows: int, /) -> None: ...
def write_rows(places: int, codes: int, sizes: tuple[int, int], table: int, rows: int, /) -> None: ...
def read_rows(places: int, codes: int, sizes: tuple[int, int], table: int, rows: int, /) -> None: ...
def changed_words(before: int, after: int, places: int, numel: int, itemsize: int, most: int, /) -> int: ...
def fingerprint(words: int, numel: int, itemsize: int, first: int, seed: int, /) -> int: ...
def move(source: int, target: int, sizes: tuple[int, int], table: int, pieces: int, /) -> None: ...
def lowrank_pieces(
    kind: str,
    p: int,
    q: int,
    m: int,
    out: int,
    table: int,
    pieces: int,
    subtract: bool,
    sizes: tuple[int, int, int, int],
    residual_and_sum: tuple[int, int] = ...,
    /,
) -> None: ...
def all_finite(x: int, numel: int, exponent: int, /) -> bool: ...
def checksum(data: int, bytes: int, /) -> tuple[int, int]: ...
def write_header(
    wire: int, bytes: int, rank: int, fingerprint: int, exchange: int, finite: bool, /
) -> None: ...
def read_header(wire: int, bytes: int, rank: int, fingerprint: int, exchange: int, /) -> bool | None: ...
def permuted(
    places: int, count: int, numel: int, bits: int, keys: tuple[int, int, int, int, int, int], /
) -> None: ...
def exponents(x: int, codes: int, sizes: tuple[int, int], key: int, first: int, /) -> None: ...
def scale_by_exponents(codes: int, out: int, sizes: tuple[int, int], /) -> None: ...
def entropy_encode(
    data: int,
    out: int,
    lengths: int,
    periods: int,
    sizes: tuple[int, int, int, int],
    first: int,
    count: int,
    /,
) -> None: ...
def entropy_decode(coded: int, out: int, sizes: tuple[int, int], first: int, count: int, /) -> bool: ...
def minifloat_encode(
    at: Four,
    sizes: Four,
    table: int,
    spans: int,
    block: int,
    format: tuple[int, int, int, float, int, int, int],
    rule: tuple[int, int, float, bool],
    keys: tuple[int, int],
    signs: tuple[int, int],
    /,
) -> None: ...
def minifloat_decode(
    at: Four,
    sizes: Four,
    table: int,
    spans: int,
    block: int,
    format: tuple[int, int, int, float, int, int, int],
    rule: tuple[int, int, float, bool],
    signs: tuple[int, int],
    sign: int,
    /,
) -> None: ...
def mix(
    out: int, models: int, weights: int, count: int, span: tuple[int, int, int],
    pulled: tuple[int, int, int, float], /,
) -> None: ...  # fmt: skip
def pack_signs(
    x: int, words: int, sizes: tuple[int, int], samples: int, channels: int, places: int, plain: bool, /
) -> None: ...
def binary_conv(
    x: int,
    weight: int,
    scale: int,
    bias: int,
    out: int,
    sizes: tuple[int, int, int, int, int],
    samples: int,
    image: tuple[int, int, int],
    kernel: tuple[int, int, int, int, int],
    made: tuple[int, int],
    rows: bool,
    plain: bool,
    /,
) -> None: ...
def lowrank(
    kind: str,
    p: int,
    q: int,
    m: int,
    out: int,
    a: int,
    b: int,
    rank: int,
    p_stride: int,
    stride: int,
    out_stride: int,
    subtract: bool,
    sizes: tuple[int, int, int, int],
    residual_and_sum: tuple[int, int] = ...,
    /,
) -> None: ...
def use(name: str, /) -> None: ...
def instruction_set() -> str: ...
def encode_two_means(
    x: int,
    codes: int,
    scales: int,
    sizes: tuple[int, int, int],
    table: int,
    lines: int,
    first: int,
    count: int,
    /,
) -> None: ...
def put_two_means(
    out: int, codes: int, scales: int, sizes: tuple[int, int, int], table: int, lines: int, sign: int, /
) -> None: ...
def grid_encode(
    x: int,
    codes: int,
    sizes: tuple[int, int],
    table: int,
    lines: int,
    keys: int,
    spacing: float,
    bits: int,
    /,
) -> None: ...
def grid_decode(
    out: int, codes: int, sizes: tuple[int, int], spacing: float, bits: int, sign: int, /
) -> None: ...
def pack_integers(integers: int, codes: int, sizes: tuple[int, int], bits: int, back: bool, /) -> None: ...
def dct(
    kind: int,
    x: int,
    values: int,
    places: int,
    sizes: tuple[int, int, int],
    table: int,
    lines: int,
    factors: int,
    factor_count: int,
    sign: int,
    /,
) -> None: ...
def subspace_project(
    x: int,
    unused: int,
    coefficients: int,
    table: int,
    lines: int,
    bases: int,
    offsets: int,
    sizes: tuple[int, int],
    /,
) -> None: ...
def subspace_restore(
    coefficients: int,
    mean: int,
    out: int,
    table: int,
    lines: int,
    bases: int,
    unused: int,
    sizes: tuple[int, int],
    /,
) -> None: ...
def squares(x: int, mean: int, out: int, table: int, pieces: int, size: int, /) -> None: ...
