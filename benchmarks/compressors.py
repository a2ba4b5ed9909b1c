"""What encoding and decoding cost, against copying the same tensor.

    python -m benchmarks.compressors                    # writes results/compressors.json
    python -m benchmarks.compressors --before ../old    # another checkout first, in the same run

One parameter of 2048 x 2048 float32 (4.2 M elements, 17 MB), out of the cache: before each call another 64 MB
are written. Every compressor that is registered takes turns with a warmed ``copy_`` of the same tensor; the
figures are medians over turns of (time / time of the copy
beside it), on one thread and on all of them. "owe" is a step of error feedback: add the residual, encode,
keep what was not sent. PowerSGD is set against its matrix products alone; PyTorch's own half-width and int8
conversions, as its hooks use them, stand beside, and torchao and pi-quant (``pip install pypiquant``) where
they are installed. A GPU is measured where there is one. glibc is told to keep what is freed, as in the ranks
that distcomp starts: otherwise the kernel's zeroing of fresh pages is most of what is measured.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import distcomp
from benchmarks._common import arguments_of, median, rank_command, write
from benchmarks._places import ROOT
from distcomp import compressors as c
from distcomp.collectives import AllReduce, Rounds
from distcomp.layout import Layout
from distcomp.methods.base import AggregateResult, StepContext
from distcomp.network.launch import MEMORY_ENV
from distcomp.randomness import Key
from distcomp.recording import surroundings
from distcomp.registry import COMPRESSORS

SIDE = 2048
LAYOUT = Layout.of([("weight", (SIDE, SIDE))])
KEY = Key.of("benchmark")

TARGET_COPIES = 2.0
"""Copies of its input that encoding, or decoding, may take on one thread."""

SUBJECTS: dict[str, c.Compressor] = {
    "identity": c.Identity(),
    "bf16": c.Cast("bf16"),
    "fp16": c.Cast("fp16"),
    "qsgd 8 bits": c.Quantize(8),
    "qsgd 8 bits, to nearest": c.Quantize(8, rounding="nearest"),
    "qsgd 4 bits": c.Quantize(4),
    "qsgd 4 bits, l2": c.Quantize(4, norm="l2"),
    "qsgd 3 bits": c.Quantize(3),
    "qsgd 2 bits (ternary)": c.Quantize(2),
    "qsgd 1 bit": c.Quantize(1),
    "sign, one scale": c.ScaledSign(),
    "one bit, two means per row": c.OneBit(),
    "natural": c.Natural(),
    "nuqsgd 4 bits": c.NonUniform(4),
    "nuqsgd 8 bits, max": c.NonUniform(8, norm="max"),
    "fixed grid, 8 bits": c.parse_compressor("fixed_grid"),
    "fixed grid, 12 bits": c.parse_compressor("fixed_grid:bits=12"),
    "fp8": c.parse_compressor("fp8"),
    "mxfp8": c.parse_compressor("mxfp8"),
    "mxfp4": c.parse_compressor("mxfp4"),
    "mxfp4, rotated": c.parse_compressor("mxfp4:hadamard=true"),
    "nvfp4": c.parse_compressor("nvfp4"),
    "top-k 1 %": c.TopK(0.01),
    "top-k 1 %, chunks of 4096": c.TopK(0.01, chunk=4096),
    "top-k 1 %, 8-bit values": c.Chain(c.TopK(0.01), c.Quantize(8, rounding="nearest")),
    "random-k 1 %": c.RandomK(0.01),
    "DCT top-k 32 of 64 x 64": c.DctTopK(32, 64),
}
WITH_FEEDBACK = ("qsgd 8 bits", "qsgd 4 bits", "qsgd 2 bits (ternary)", "qsgd 1 bit", "sign, one scale")
WITH_FEEDBACK += ("one bit, two means per row", "top-k 1 %", "top-k 1 %, chunks of 4096")
"""Those whose step of error feedback is measured, too."""

Step = Callable[[], object]


EVICT = torch.zeros(1 << 24)
"""What is written between two calls, so that neither finds its tensors in a cache."""


def seconds(step: Step) -> float:
    """One call, the device waited for."""
    EVICT.add_(1)
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


def both_ways(name: str, x: Tensor, out: Tensor) -> dict[str, Step]:
    """Encoding and decoding, and for some a step of error feedback."""
    compressor = SUBJECTS[name]
    payload = compressor.encode(x, LAYOUT, KEY)
    steps: dict[str, Step] = {
        "encode": lambda: compressor.encode(x, LAYOUT, KEY),
        "decode": lambda: compressor.decode_into(out, payload, LAYOUT),
    }
    if name in WITH_FEEDBACK:
        residual = torch.randn(x.numel(), generator=torch.Generator().manual_seed(1)).to(x.device)
        steps["owe"] = lambda: owe(compressor, x, residual)
    return steps


def owe(compressor: c.Compressor, x: Tensor, residual: Tensor) -> Tensor:
    """What is left of ``x + residual`` when it was encoded: a step of error feedback."""
    if hasattr(compressor, "encode_owing"):
        owed = torch.empty_like(x)
        compressor.encode_owing(x, residual, owed, LAYOUT, KEY)
        return owed
    corrected = x + residual  # a checkout from before there was a function for it
    compressor.subtract_from(corrected, compressor.encode(corrected, LAYOUT, KEY), LAYOUT)
    return corrected


def of_pytorch(x: Tensor, out: Tensor) -> Iterator[tuple[str, dict[str, Step]]]:
    """The conversions inside PyTorch's hooks, fp16_compress and the quantization hooks' int8; and torchao's
    int8 with a scale for every 512 values."""
    half = x.half()
    yield "torch fp16", {"encode": lambda: x.to(torch.float16).div_(2), "decode": lambda: out.copy_(half)}
    if x.device.type != "cpu":
        return
    eight = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
    yield (
        "torch int8, one scale",
        {
            "encode": lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
            "decode": lambda: eight.dequantize(),
        },
    )
    if importlib.util.find_spec("torchao") is None:
        return
    from torchao.quantization import quant_primitives as ao

    def quantized() -> tuple[Tensor, Tensor, Tensor]:
        scale, zero = ao.choose_qparams_affine(x, ao.MappingType.SYMMETRIC, (512,), torch.int8)
        return ao.quantize_affine(x, (512,), scale, zero, torch.int8), scale, zero

    codes, scale, zero = quantized()
    yield (
        "torchao int8, blocks of 512",
        {
            "encode": quantized,
            "decode": lambda: ao.dequantize_affine(codes, (512,), scale, zero, torch.int8),
        },
    )


def of_pi_quant(x: Tensor, out: Tensor) -> Iterator[tuple[str, dict[str, Step]]]:
    """pi-quant's own: one scale and one zero point for the whole tensor, found in a pass of its own."""
    if x.device.type != "cpu" or importlib.util.find_spec("piquant") is None:
        return
    import piquant

    context = piquant.Context(torch.get_num_threads())
    full = piquant.DataType.F32
    for bits, kind in ((8, piquant.DataType.UINT8), (4, piquant.DataType.UINT4), (2, piquant.DataType.UINT2)):
        codes = torch.empty(x.numel() * bits // 8, dtype=torch.uint8)
        about = context.compute_quant_params_ptr_float32(x.data_ptr(), kind, x.numel())
        for mode in (piquant.RoundMode.STOCHASTIC, piquant.RoundMode.NEAREST):

            def encode(kind: Any = kind, mode: Any = mode, codes: Tensor = codes) -> None:
                found = context.compute_quant_params_ptr_float32(x.data_ptr(), kind, x.numel())
                context.quantize_ptr(x.data_ptr(), full, codes.data_ptr(), kind, x.numel(), *found, mode)

            def decode(kind: Any = kind, about: Any = about, codes: Tensor = codes) -> None:
                to, set_ = out.data_ptr(), piquant.ReduceOp.SET
                context.dequantize_ptr(codes.data_ptr(), kind, to, full, x.numel(), *about, set_)

            rounding = "to nearest" if mode is piquant.RoundMode.NEAREST else "at random"
            yield f"pi-quant {bits} bits, {rounding}", {"encode": encode, "decode": decode}


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
    subjects = ((name, both_ways(name, x, out)) for name in SUBJECTS)
    for name, steps in itertools.chain(subjects, of_pytorch(x, out), of_pi_quant(x, out)):
        rows[name] = against(lambda: out.copy_(x), steps, turns)
        print(f"  {name:<30}" + "".join(f"{k}{v['copies']:7.2f}  " for k, v in rows[name].items()))
    rows["powersgd rank 4"] = powersgd(x, turns)
    print(f"  {'powersgd rank 4':<30}{rows['powersgd rank 4']['times_products']:.2f} times its products")
    return {"copy_s": median([seconds(lambda: out.copy_(x)) for _ in range(turns)]), "rows": rows}


def keep_freed_memory() -> None:
    """Start this script once more, in the environment that distcomp gives its ranks."""
    if not set(MEMORY_ENV) <= set(os.environ):
        os.execve(sys.executable, [*rank_command("compressors"), *sys.argv[1:]], {**os.environ, **MEMORY_ENV})


def check_complete() -> None:
    """Every registered compressor has a row: one that nobody measures is one that nobody made fast."""
    of_chains = (part for one in SUBJECTS.values() for part in vars(one).values())
    measured = {type(one) for one in (*SUBJECTS.values(), *of_chains)}
    missing = [name for name, entry in COMPRESSORS.items() if entry.make not in measured]
    missing = [name for name in missing if isinstance(COMPRESSORS[name].make, type)]
    if missing:
        raise SystemExit(f"no row measures {', '.join(missing)}; add it to SUBJECTS")


def of_checkout(checkout: Path, turns: int, threads: list[int]) -> dict[str, Any]:
    """What this script finds in another checkout of the repository."""
    command = [*rank_command("compressors"), "--json", "--turns", str(turns), "--threads", *map(str, threads)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout.resolve()), *sys.path[1:]])}
    done = subprocess.run(
        command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{\n") :])
    return found


def main() -> None:
    keep_freed_memory()
    check_complete()
    parser = arguments_of(__doc__)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="*", help="numbers of threads; 1 and all by default")
    parser.add_argument("--before", type=Path, help="a checkout that is measured first, and kept beside")
    parser.add_argument("--json", action="store_true", help="print the result, and write no file")
    arguments = parser.parse_args()
    cores = torch.get_num_threads()
    counts = arguments.threads or sorted({1, cores})
    before = of_checkout(arguments.before, arguments.turns, counts) if arguments.before else None
    x = torch.randn(SIDE * SIDE, generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {"elements": x.numel(), "target_copies": TARGET_COPIES, "gpu": "not measured"}
    for threads in counts:
        torch.set_num_threads(threads)
        print(f"{threads} thread{'s' * (threads > 1)}, times of a copy")
        found[f"cpu_{threads}"] = measure(x, arguments.turns)
    if torch.cuda.is_available():
        print(torch.cuda.get_device_name())
        found["gpu"] = {"name": torch.cuda.get_device_name(), **measure(x.cuda(), arguments.turns)}
    if arguments.json:
        print(json.dumps({**surroundings(ROOT), **found}, indent=1))
    else:
        kept = {} if before is None else {"before": before}
        print(f"written to {write('compressors', {**found, **kept})}", file=sys.stderr)


if __name__ == "__main__":
    main()
