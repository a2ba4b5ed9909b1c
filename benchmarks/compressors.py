"""What encoding and decoding cost, against copying the same tensor.

    python -m benchmarks.compressors            # writes results/compressors.json

One parameter of 4096 x 4096 float32 (16.8 M elements, 67 MB). Every compressor takes turns with a warmed
``copy_`` of the same tensor; the figures are medians over turns of (time / time of the copy beside it), on
one thread and on all of them. PowerSGD is set against its matrix products alone; PyTorch's own half-width and
int8 conversions, as its hooks use them, stand beside. A GPU is measured where there is one. glibc is told to
keep what is freed, as in the ranks that distcomp starts: otherwise the kernel's zeroing of fresh pages is
most of what is measured.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import distcomp
from benchmarks._common import arguments_of, median, rank_command, write
from distcomp import compressors as c
from distcomp.collectives import AllReduce, Rounds
from distcomp.layout import Layout
from distcomp.methods.base import AggregateResult, StepContext
from distcomp.network.launch import MEMORY_ENV
from distcomp.randomness import Key

SIDE = 4096
LAYOUT = Layout.of([("weight", (SIDE, SIDE))])
KEY = Key.of("benchmark")

TARGETS = {"encode": 1.3, "decode": 1.0}
"""Times of the copy that a quantizer of fixed width may take."""

QUANTIZERS: dict[str, c.Compressor] = {
    "qsgd 8 bits": c.Quantize(8),
    "qsgd 4 bits": c.Quantize(4),
    "qsgd 2 bits (ternary)": c.Quantize(2),
    "qsgd 1 bit": c.Quantize(1),
    "qsgd 8 bits, to nearest": c.Quantize(8, rounding="nearest"),
    "sign, one scale": c.ScaledSign(),
}
OTHERS: dict[str, c.Compressor] = {
    "bf16": c.Cast("bf16"),
    "fp16": c.Cast("fp16"),
    "qsgd 4 bits, l2": c.Quantize(4, norm="l2"),
    "qsgd 3 bits": c.Quantize(3),
    "natural": c.Natural(),
    "nuqsgd 4 bits": c.NonUniform(4),
    "one bit, two means per row": c.OneBit(),
    "top-k 1 %": c.TopK(0.01),
    "top-k 1 %, chunks of 4096": c.TopK(0.01, chunk=4096),
    "random-k 1 %": c.RandomK(0.01),
    "top-k 1 %, 8-bit values": c.Chain(c.TopK(0.01), c.Quantize(8, rounding="nearest")),
    "DCT top-k 32 of 64 x 64": c.DctTopK(32, 64),
}

Step = Callable[[], object]


def seconds(step: Step) -> float:
    """One call, the device waited for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin_s = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin_s


def against(copy: Step, steps: dict[str, Step], turns: int) -> dict[str, dict[str, float]]:
    """Each step in turn with the copy, after one call that warms it up."""
    for step in steps.values():
        step()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(turns):
        for name, step in steps.items():
            seconds(copy)
            times[name].append((seconds(copy), seconds(step)))
    return {
        name: {"s": median([t for _, t in pairs]), "copies": median([t / unit for unit, t in pairs])}
        for name, pairs in times.items()
    }


def both_ways(compressor: c.Compressor, x: Tensor, out: Tensor) -> dict[str, Step]:
    payload = compressor.encode(x, LAYOUT, KEY)
    return {
        "encode": lambda: compressor.encode(x, LAYOUT, KEY),
        "decode": lambda: compressor.decode_into(out, payload, LAYOUT),
    }


def of_pytorch(x: Tensor, out: Tensor) -> Iterator[tuple[str, dict[str, Step]]]:
    """The conversions inside PyTorch's hooks: fp16_compress, and the quantization hooks' int8."""
    half = x.half()
    yield "torch fp16", {"encode": lambda: x.to(torch.float16).div_(2), "decode": lambda: out.copy_(half)}
    if x.device.type == "cpu":
        eight = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
        yield (
            "torch int8, one scale",
            {
                "encode": lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
                "decode": lambda: eight.dequantize(),
            },
        )


def alone(exchange: Rounds[AggregateResult]) -> AggregateResult:
    """A exchange of sums, held by one worker with itself."""
    try:
        request = next(exchange)
        while True:
            assert isinstance(request, AllReduce)
            request = exchange.send(request.x)
    except StopIteration as stop:
        result: AggregateResult = stop.value
        return result


def powersgd(x: Tensor, turns: int, rank: int = 4) -> dict[str, float]:
    """A step of PowerSGD by one worker, against the three products in it alone."""
    method = distcomp.parse(f"powersgd:rank={rank},error_feedback=False")
    state = method.init(LAYOUT)
    context = StepContext(0, 1, LAYOUT, 0, KEY)
    matrix, q = x.view(SIDE, SIDE), torch.randn(SIDE, rank, device=x.device)
    p = matrix @ q

    def products() -> None:
        torch.mm(matrix, q)
        torch.mm(matrix.t(), p)
        torch.mm(p, q.t())

    def step() -> None:
        alone(method.aggregate(x, state, context))

    step()
    pairs = [(seconds(products), seconds(step)) for _ in range(turns)]
    return {
        "s": median([t for _, t in pairs]),
        "products_s": median([unit for unit, _ in pairs]),
        "times_products": median([t / unit for unit, t in pairs]),
    }


def measure(x: Tensor, turns: int) -> dict[str, Any]:
    out = torch.empty_like(x)
    rows: dict[str, Any] = {}
    subjects = [(name, both_ways(one, x, out)) for name, one in {**QUANTIZERS, **OTHERS}.items()]
    for name, steps in [*subjects, *of_pytorch(x, out)]:
        rows[name] = against(lambda: out.copy_(x), steps, turns)
        print(f"  {name:<30}" + "".join(f"{k}{v['copies']:7.2f}  " for k, v in rows[name].items()))
    rows["powersgd rank 4"] = powersgd(x, turns)
    print(f"  {'powersgd rank 4':<30}{rows['powersgd rank 4']['times_products']:.2f} times its products")
    return {"copy_s": median([seconds(lambda: out.copy_(x)) for _ in range(turns)]), "rows": rows}


def keep_freed_memory() -> None:
    """Start this script once more, in the environment that distcomp gives its ranks."""
    if not set(MEMORY_ENV) <= set(os.environ):
        os.execve(sys.executable, [*rank_command("compressors"), *sys.argv[1:]], {**os.environ, **MEMORY_ENV})


def main() -> None:
    keep_freed_memory()
    parser = arguments_of(__doc__)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print the result, too")
    arguments = parser.parse_args()
    x = torch.randn(SIDE * SIDE, generator=torch.Generator().manual_seed(0))
    cores = torch.get_num_threads()
    found: dict[str, Any] = {"elements": x.numel(), "targets_in_copies": TARGETS, "gpu": "not measured"}
    for threads in sorted({1, cores}):
        torch.set_num_threads(threads)
        print(f"{threads} thread{'s' * (threads > 1)}, times of a copy")
        found[f"cpu_{threads}"] = measure(x, arguments.turns)
    if torch.cuda.is_available():
        print(torch.cuda.get_device_name())
        found["gpu"] = {"name": torch.cuda.get_device_name(), **measure(x.cuda(), arguments.turns)}
    path = write("compressors", found)
    if arguments.json:
        print(json.dumps(found, indent=1))
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
