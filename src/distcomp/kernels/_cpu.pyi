def quantize(
    x: int,
    codes: int,
    scales: int,
    numel: int,
    block: int,
    bits: int,
    key: int,
    first: int,
    stochastic: bool,
    given: bool,
    /,
) -> None: ...
def dequantize(
    codes: int, scales: int, out: int, numel: int, block: int, bits: int, sign: int, times: float, /
) -> None: ...
def all_finite(x: int, numel: int, exponent: int, /) -> bool: ...
def checksum(data: int, bytes: int, /) -> tuple[int, int]: ...
def use(name: str, /) -> None: ...
def instruction_set() -> str: ...
