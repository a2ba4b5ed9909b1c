"""What two stages, damping and the choice of a pattern cost: variance, distance and loss, over five seeds.

    python benchmarks/feedback_stages.py --out benchmarks/results/feedback_stages.json

Five tables, each on small problems with all workers in one process. ``--label`` names the version in the
result; the figures of another version are kept beside it, so that a run of an older checkout and one of this
make the table of before and after. Uses nothing but what both have.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distcomp.averaging.gossip import DeepSqueeze
from distcomp.averaging.recipes.gossip import ecd
from distcomp.averaging.workers import Workers
from distcomp.compressors import NonUniform, Quantize
from distcomp.layout import Layout
from distcomp.methods import EF21, ErrorFeedback, Method, StepContext, from_compressor, parse
from distcomp.randomness import Key
from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.lockstep import Lockstep

SEEDS = range(5)
RATE = 1.0
"""Learning rate of the classifier of digit pairs."""


def converse(method: Method, xs: list[Tensor], states: list[Any], layout: Layout, key: Key, step: int) -> Any:
    """One exchange of all workers: the estimate and the new states."""
    profiles = [
        Aggregation(method, x, state, StepContext(rank, len(xs), layout, step, key))
        for rank, (x, state) in enumerate(zip(xs, states, strict=True))
    ]
    Lockstep(len(xs)).run(profiles)
    results = [profile.result for profile in profiles]
    assert all(result is not None for result in results)
    return results[0].estimate, [result.state for result in results]  # type: ignore[union-attr]


def ecd_stands_still(seed: int) -> dict[str, float]:
    """``|mean - x0| / |x0|`` of 4 equal workers without gradient after 1,000 exchanges."""
    draw = torch.randn(500, generator=torch.Generator().manual_seed(seed))
    starts = {"N(0,1)": draw, "N(0,10)": 10 * draw, "100 among N(0,0.02)": 0.02 * draw}
    starts["100 among N(0,0.02)"][0] = 100.0
    found = {}
    for name, x in starts.items():
        workers = Workers(ecd(), x, 4, seed=seed)
        for _ in range(1000):
            workers.step()
        found[name] = float((workers.mean - x).norm() / x.norm())
    return found


def deepsqueeze_agrees(seed: int) -> dict[str, float]:
    """Spread after 400 exchanges of 8 workers on a ring, no gradient, eta 0.1, over the spread at first."""
    starts = torch.randn(8, 1024, generator=torch.Generator().manual_seed(seed))
    found = {}
    for name, compressor in {"qsgd 2 bits": Quantize(2), "nuqsgd 3 bits": NonUniform(3)}.items():
        workers = Workers(DeepSqueeze(compressor), torch.zeros(1024), 8, seed=seed)
        workers.stacked.copy_(starts)
        for _ in range(400):
            workers.step()
        found[name] = workers.spread / float((starts - starts.mean(0)).square().mean())
    return found


def digit_pairs(seed: int, size: int, method: Method, steps: int = 300) -> float:
    """Final training loss of a small classifier of pairs of digits, mean of the last 30 steps."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 19))
    parameters = list(model.named_parameters())
    layout = Layout.of([(name, tuple(parameter.shape)) for name, parameter in parameters])
    states: list[Any] = [method.init(layout)] * size
    generator, losses = torch.Generator().manual_seed(seed), []
    for step in range(steps):
        xs = []
        for _ in range(size):
            pairs = torch.randint(len(images), (16, 2), generator=generator)
            loss = nn.functional.cross_entropy(model(images[pairs].flatten(1)), labels[pairs].sum(1))
            model.zero_grad()
            loss.backward()
            xs.append(torch.cat([p.grad.reshape(-1) for _, p in parameters if p.grad is not None]))
            losses.append(loss.item())
        estimate, states = converse(method, xs, states, layout, Key.of(seed, step), step)
        with torch.no_grad():
            for (_, parameter), (_, piece) in zip(parameters, layout.pieces(estimate), strict=True):
                parameter -= RATE * piece.view_as(parameter)
    return sum(losses[-30 * size :]) / (30 * size)


def two_stages(seed: int) -> dict[str, float]:
    """Error feedback over the two-stage pattern."""
    found = {}
    for size in (4, 8):
        for bits in (1, 2):
            method = ErrorFeedback(from_compressor(Quantize(bits, rounding="nearest"), "reduce_scatter"))
            found[f"{bits} bits, n={size}"] = digit_pairs(seed, size, method)
    return found


def auto_variance(seed: int) -> dict[str, float]:
    """Variance of ``auto`` over that of gathering where ranks share a signal, and its bytes."""
    layout = Layout.of([("w", (64, 512))])
    signal = torch.randn(layout.numel, generator=torch.Generator().manual_seed(seed))
    found = {}
    for text in ("qsgd:bits=4", "qsgd:bits=2", "natural"):
        for size in (3, 8, 16):
            auto: Any = parse(text)
            while not hasattr(auto, "compressor"):
                auto = auto.usual
            errors = []
            for method in (from_compressor(auto.compressor), from_compressor(auto.compressor, "all_gather")):
                estimate, _ = converse(method, [signal] * size, [{}] * size, layout, Key.of(seed), 0)
                errors.append(float((estimate - signal).square().sum()))
            found[f"{text}, n={size}: variance"] = errors[0] / errors[1]
            found[f"{text}, n={size}: bits sent per value"] = (
                8 * from_compressor(auto.compressor).payload_bytes(layout, size, 0) / layout.numel
            )
    return found


def ef21_descends(seed: int) -> dict[str, float]:
    """Relative distance from the optimum of three workers' quadratics after 100 steps."""
    layout = Layout.of([("w", (32, 32))])
    targets = torch.randn(3, layout.numel, generator=torch.Generator().manual_seed(seed))
    found = {}
    for bits in (2, 3):
        method, w = EF21(Quantize(bits)), torch.zeros(layout.numel)
        states: list[Any] = [method.init(layout)] * 3
        for step in range(100):
            xs = [w - target for target in targets]
            estimate, states = converse(method, xs, states, layout, Key.of(seed, step), step)
            w = w - 0.1 * estimate
        found[f"{bits} bits"] = float((w - targets.mean(0)).norm() / targets.mean(0).norm())
    return found


TABLES = {
    "ecd: distance of still models": ecd_stands_still,
    "deepsqueeze: spread": deepsqueeze_agrees,
    "two-stage feedback: final loss": two_stages,
    "auto": auto_variance,
    "ef21: distance": ef21_descends,
}


def plain(number: float) -> float | str:
    """What JSON can hold: what is not finite, as text."""
    return number if math.isfinite(number) else str(number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--label", default="after")
    parser.add_argument("--tables", nargs="*", default=list(TABLES), help="of: " + ", ".join(TABLES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    result["host"] = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seeds": list(SEEDS),
    }
    for title in arguments.tables:
        rows = [TABLES[title](seed) for seed in SEEDS]
        table = {
            name: {
                "mean": plain(sum(row[name] for row in rows) / len(rows)),
                "each": [plain(row[name]) for row in rows],
            }
            for name in rows[0]
        }
        result.setdefault(arguments.label, {})[title] = table
        print(title, {name: value["mean"] for name, value in table.items()}, flush=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
