"""Packed binary layers against torch's float32 ones, in one run: seconds and bytes of weights.

    python -m benchmarks.binary_layers            # a minute; one thread; writes results/binary_layers.json

Linear layers and 3 x 3 convolutions. The time of a packed layer includes taking the signs of its float32
input; medians of interleaved runs.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from benchmarks._common import arguments_of, median, write
from distcomp import kernels, precision

REPETITIONS, WARM = 15, 3
LINEAR = [(256, 64), (512, 1), (512, 64), (1024, 64), (2048, 64)]
CONVOLUTIONS = [(128, 28), (256, 14), (512, 7), (512, 14), (1024, 7)]


def seconds(layer: nn.Module, x: torch.Tensor) -> float:
    began_s = time.perf_counter()
    layer(x)
    return time.perf_counter() - began_s


@torch.no_grad()
def compare(plain: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """The plain layer against the same one, binary and packed."""
    weight_bytes = plain.weight.nbytes
    binary = precision.bnn(type(plain)(*_sizes(plain), bias=False, **_how(plain)), skip=())
    expected = binary(x)
    packed = precision.pack(binary)
    assert torch.equal(packed(x), expected)
    times: dict[str, list[float]] = {"float32": [], "packed": []}
    for repetition in range(REPETITIONS + WARM):
        for name, layer in (("float32", plain), ("packed", packed)):
            spent_s = seconds(layer, x)
            if repetition >= WARM:
                times[name].append(spent_s)
    float_s, packed_s = median(times["float32"]), median(times["packed"])
    return {
        "float32_s": float_s,
        "packed_s": packed_s,
        "ratio": float_s / packed_s,
        "weights_smaller": weight_bytes / packed.words.nbytes,
    }


def _sizes(layer: nn.Module) -> tuple[int, ...]:
    weight = layer.weight
    return (weight.shape[1], weight.shape[0], *weight.shape[3:])


def _how(layer: nn.Module) -> dict[str, int]:
    return {"padding": layer.padding[0]} if isinstance(layer, nn.Conv2d) else {}


def main() -> None:
    arguments_of(__doc__).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: dict[str, Any] = {}
    for width, batch in LINEAR:
        rows[f"linear {width} x {width}, batch {batch}"] = compare(
            nn.Linear(width, width, bias=False), torch.randn(batch, width)
        )
    for channels, side in CONVOLUTIONS:
        rows[f"3x3 convolution, {channels} channels, {side} x {side}, batch 8"] = compare(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), torch.randn(8, channels, side, side)
        )
    path = write(
        "binary_layers", {"threads": 1, "backend": kernels.backend(), "turns": REPETITIONS, "layers": rows}
    )
    for name, row in rows.items():
        print(f"{name:<52}{row['ratio']:6.1f} x faster{row['weights_smaller']:6.1f} x smaller")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
