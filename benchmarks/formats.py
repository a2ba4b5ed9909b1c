"""Floats of 4 and 8 bits as gradients' payloads, and DeMo's values in few bits: errors, bytes, test losses.

    python -m benchmarks.formats        # resumes; writes results/formats.json

*Errors*: relative squared error on a gradient of ``examples/bytes_lm.py`` after 30 steps, by bits per value;
integers of the same bits beside, and, simulated, the 15 levels that err least on a Gaussian (Lloyd, Max) in
units of a block's root mean square, which need a codec only if they beat integers at equal bytes. *Losses*:
four workers in lock-step on pairs of digits, SGD with momentum; DeMo steps by signs, without momentum in the
optimizer. Mean and spread of three seeds; no communication is the control.
"""

from __future__ import annotations

import runpy
import statistics
from typing import Any

import torch
from torch import Tensor

from benchmarks._common import Cells, arguments_of
from benchmarks._crowd import Plan, Task, digit_pairs, train, warm_up_then_cosine
from benchmarks._places import EXAMPLES
from distcomp.compressors import parse_compressor
from distcomp.layout import Layout
from distcomp.methods import Method, parse
from distcomp.randomness import Key

WORKERS, STEPS, SEEDS, RATE, SIGN_RATE = 4, 150, 3, 0.4, 0.004
ERRORS = (
    "quantize:bits=8", "fp8", "fp8:rounding=nearest", "mxfp8", "mxfp8:rounding=nearest", "mxfp8:format=e5m2",
    "quantize:bits=4", "quantize:bits=4,block=32", "quantize:bits=4,rounding=nearest", "nonuniform:bits=4",
    "mxfp4", "mxfp4:rounding=nearest", "mxfp4:hadamard=true", "nvfp4", "nvfp4:rounding=nearest",
    "nvfp4:hadamard=true",
)  # fmt: skip
LOSSES = (
    "identity", "qsgd:bits=8", "fp8", "mxfp8", "qsgd:bits=4", "mxfp4", "mxfp4:rounding=nearest",
    "mxfp4:hadamard=true", "nvfp4", "none",
)  # fmt: skip
DEMO = ("demo", "demo:values=int8", "demo:values=int1", "demo:values=onebit")
LEVELS, BLOCK = 15, 512


def gradient() -> tuple[Tensor, Layout]:
    """Of the matrices, after 30 steps."""
    example = runpy.run_path(str(EXAMPLES / "bytes_lm.py"), run_name="example")
    source, draw = torch.cat(example["modules"]()), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = example["Reader"]()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.95))
    for _ in range(31):
        text, following = example["texts"](source, 8, draw)
        optimizer.zero_grad()
        example["loss_of"](model(text), following).backward()
        optimizer.step()
    named = [(name, one) for name, one in model.named_parameters() if one.dim() > 1]
    layout = Layout.of([(name, tuple(one.shape)) for name, one in named])
    return torch.cat([one.grad.reshape(-1) for _, one in named]), layout


def error_row(name: str, x: Tensor, layout: Layout) -> dict[str, Any]:
    c = parse_compressor(name)
    decoded = c.decode(c.encode(x, layout, Key.of(1)), layout)
    error = float((decoded - x).double().square().sum() / x.double().square().sum())
    return {"bits_per_value": 8 * c.wire_bytes(layout) / layout.numel, "error": error, "unbiased": c.unbiased}


def gaussian_levels() -> Tensor:
    """Lloyd's iteration on a Gaussian: each level the mean of what is nearest to it."""
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0)).sort().values
    levels = torch.linspace(-2.4, 2.4, LEVELS)
    for _ in range(200):
        nearest = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        sums = torch.zeros(LEVELS).index_add_(0, nearest, x)
        levels = sums / torch.bincount(nearest, minlength=LEVELS).clamp(min=1)
    return levels


def lloyd_max_row(x: Tensor) -> dict[str, Any]:
    """To the nearest of those levels, in units of the root mean square of each 512 values."""
    rows = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    unit = rows.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)
    levels = gaussian_levels()
    decoded = levels[torch.bucketize(rows / unit, (levels[1:] + levels[:-1]) / 2)] * unit
    error = float((decoded - rows).double().square().sum() / rows.double().square().sum())
    return {"bits_per_value": 4 + 32 / BLOCK, "error": error, "unbiased": False}


def plan(seed: int, signs: bool) -> Plan:
    def optimizer(weights: Any) -> torch.optim.Optimizer:
        if signs:
            return torch.optim.SGD(weights, SIGN_RATE)
        return torch.optim.SGD(weights, RATE, momentum=0.8, nesterov=True)

    return Plan(workers=WORKERS, steps=STEPS, optimizer=optimizer, rate=warm_up_then_cosine(STEPS), seed=seed)


def loss_row(cells: Cells, task: Task, name: str) -> dict[str, Any]:
    method: Method = parse(name)
    signs = name.startswith("demo")
    runs = [
        cells.get(f"{name} | seed {s}", lambda s=s: train(task, plan(s, signs), method)) for s in range(SEEDS)
    ]
    losses = [run.get("test_loss", float("inf")) for run in runs]
    return {
        "test_loss": losses,
        "mean": statistics.mean(losses),
        "spread": statistics.stdev(losses),
        "sent_bytes_per_step": runs[0].get("sent_bytes", 0) / STEPS,
    }


def main() -> None:
    arguments_of(__doc__).parse_args()
    torch.set_num_threads(1)
    about = {
        "task": "errors: a byte-level language model; losses: pairs of digits, 18,000 parameters",
        "workers": WORKERS, "steps": STEPS, "seeds": SEEDS, "rate": RATE, "rate_of_signs": SIGN_RATE,
    }  # fmt: skip
    cells = Cells("formats", about)
    x, layout = gradient()
    errors = {name: error_row(name, x, layout) for name in ERRORS}
    cells.document["errors"] = {**errors, "15 Lloyd-Max levels, simulated": lloyd_max_row(x)}
    cells.write()
    task, table = digit_pairs(), {}
    for name in (*LOSSES, *DEMO):
        table[name] = loss_row(cells, task, name)
        cells.document["losses"] = table
        cells.write()
        print(name, table[name], flush=True)


if __name__ == "__main__":
    main()
