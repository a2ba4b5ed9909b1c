"""What every method computes, as digests: 50 steps of 2, 3 and 4 workers in lock-step, the same on any day.

    python -m benchmarks.method_digests --write benchmarks/results/method_digests_before.json
    python -m benchmarks.method_digests --against benchmarks/results/method_digests_before.json

The first writes the digests, the second computes them again and prints each row that differs; it exits with 1
if any does. A change that should change no number is shown to change none by running it before and after.

A row is one method at some settings and one world size: the SHA-256 of all estimates and of all
contributions (of methods for gradients), or of all models (of averaging), after the first step and after all
of them, and the bytes that each rank sent in each step, by kind. Rows are compared by their name; the text
beside it is how the settings are spelt today. Inputs are made here, of a counter, in integers that float32
holds exactly: they depend on no library's generator.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch read it: sums must not depend on the cores

import numpy as np
import torch

import distcomp
from distcomp.averaging.workers import Workers
from distcomp.layout import Layout
from distcomp.methods import METHODS, StepContext, parse
from distcomp.randomness import Key
from distcomp.recording import surroundings
from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.lockstep import Lockstep

STEPS = 50
SIZES = (2, 3, 4)
SEED = 7

SHAPES = [
    ("embedding.weight", (37, 24)),
    ("conv.weight", (16, 8, 3, 3)),
    ("norm.weight", (16,)),
    ("norm.bias", (16,)),
    ("fc.weight", (64, 40)),
    ("fc.bias", (40,)),
    ("odd", (7, 11, 13)),
    ("long_bias", (1031,)),
]
ROLES = {"norm.weight": "norm", "norm.bias": "norm", "embedding.weight": "embedding"}

# --- The adapter: all that is known here of distcomp's inside. ---


class GradientWorld:
    """``size`` workers that agree on the mean of their gradients, step by step."""

    def __init__(self, method: Any, size: int) -> None:
        self.layout = Layout.of(SHAPES, roles=ROLES)
        self.method, self.size, self.steps = method, size, 0
        self.net = Lockstep(size)
        self.states = [method.init(self.layout) for _ in range(size)]

    def step(self, xs: Sequence[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
        """One exchange of ``xs``, a gradient per worker: every worker's estimate and contribution."""
        key = Key.of(SEED, self.steps)
        profiles = [
            Aggregation(self.method, x, state, StepContext(rank, self.size, self.layout, self.steps, key))
            for rank, (x, state) in enumerate(zip(xs, self.states, strict=True))
        ]
        self.net.run(profiles)
        results: list[Any] = [profile.result for profile in profiles]
        self.states = [result.state for result in results]
        self.steps += 1
        return {
            "estimates": [result.estimate for result in results],
            "contributions": [result.contribution() for result in results],
        }

    def sent_bytes(self) -> list[Mapping[str, int]]:
        """Per worker: bytes sent so far, by kind."""
        return [ledger.sent_bytes for ledger in self.net.ledgers]


class AveragingWorld:
    """``size`` workers that train models of their own and average them."""

    def __init__(self, averaging: Any, size: int) -> None:
        layout = Layout.of(SHAPES, roles=ROLES)
        start = torch.from_numpy(noise(0, 0, layout.numel))
        self.workers = Workers(averaging, start, size, layout, SEED)

    def step(self, xs: Sequence[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
        """Each model goes an eighth of the way to ``xs``; then what is due is exchanged."""
        for model, x in zip(self.workers.models, xs, strict=True):
            model.add_((x - model).mul_(0.125))
        self.workers.step()
        return {"models": list(self.workers.models)}

    def sent_bytes(self) -> list[Mapping[str, int]]:
        """Per worker: bytes sent so far, by kind."""
        return [ledger.sent_bytes for ledger in self.workers.net.ledgers]


def world_of(text: str, size: int) -> GradientWorld | AveragingWorld:
    """The workers that run the method which ``text`` names. Raises DistcompError where they cannot."""
    entry = METHODS[text.partition(":")[0]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that are known to be coarse
        method = parse(text)
        if entry.kind == "gradient":
            return GradientWorld(method, size)
        method.conditions(Layout.of(SHAPES, roles=ROLES), size)
        return AveragingWorld(method, size)


def registered() -> list[str]:
    """The names of all methods that exchange gradients or models: predictions are of examples."""
    return sorted(name for name, entry in METHODS.items() if entry.kind != "predictions")


# --- The rows: a name that stays, and how it is spelt today. ---


def each(form: str, *values: object) -> list[str]:
    """``form`` with each value in turn."""
    return [form.format(value) for value in values]


SPELT_TODAY = {
    "pattern=gather": "pattern=all_gather",
    "pattern=scatter": "pattern=reduce_scatter",
    "(Quantize:": "(quantize:",
    "(Cast:dtype=bf16)": "bf16",
    "hierarchical:": "multi_level:",
}
"""Words of the names that have become others since the rows were first named."""


def as_spelt_today(name: str) -> str:
    for first, today in SPELT_TODAY.items():
        name = name.replace(first, today)
    return name


ROWS: dict[str, str] = {
    name: as_spelt_today(name)
    for name in [
        "identity", "bf16", "fp16", "none",
        *each("qsgd:bits={}", 1, 2, 4, 8),
        *each("qsgd:bits=4,pattern={}", "gather", "scatter"),
        *each("qsgd:bits=1,pattern={}", "gather", "scatter"),
        *each("qsgd:bits={},error_feedback=true", 2, 4),
        "qsgd:bits=1,error_feedback=false",
        "qsgd:bits=4,norm=l2", "qsgd:bits=4,rounding=nearest", "qsgd:bits=3,block=128",
        "qsgd:bits=8 -> 2 @ 20",
        "momentum_correction", "momentum_correction:nesterov=true,masking=false",
        "momentum_correction:inner=(qsgd:bits=1)",
        "dgc:ratio=0.05", "dgc:ratio=0.05,clip=1.0,nesterov=true,values=int4",
        "demo", "demo:k=8,side=16,sign=false",
        "ef21", "ef21:eta=0.25", *each("ef21:pattern={}", "gather", "scatter"),
        "ef21:compressor=(Quantize:bits=4)", "ef21:compressor=(Cast:dtype=bf16),pattern=all_reduce",
        *each("shared_range:bits={}", 2, 4, 8),
        "shared_range:bits=4,hadamard=true", "shared_range:bits=2,error_feedback=true",
        "terngrad", "terngrad:clip=0.0",
        "fixed_point", *each("fixed_point:pattern={}", "all_reduce", "gather", "scatter"),
        "fixed_point:format=Q2.6",
        "gradiveq:learn=5,compressed=10",
        "gradiveq:learn=5,compressed=10,mean=zero,error_feedback=true,coefficient_bits=4,plain_bits=32",
        "gradiveq:learn=5,compressed=10,ratio=4.0,others=(powersgd:rank=2)",
        "two_level", "two_level:nodes=((0,1),(2,3))",
        "two_level:nodes=((0,1),(2,3)),across=(powersgd:rank=2)",
        "two_level:nodes=((0,1),(2,3)),inside=bf16,across=(topk:ratio=0.05)",
        "two_level:nodes=((0,1,2),),across=(qsgd:bits=1)",
        "majority_vote", "majority_vote:magnitude=one",
        "onebit_adam:freeze_step=10", "onebit_adam:freeze_step=10,bits=4",
        *each("powersgd:rank={}", 1, 2, 4), "powersgd:rank=2,error_feedback=false",
        "powersgd:rank=2,one_round=true",
        *each("natural:bits={}", 9, 4), *each("nuqsgd:bits={}", 3, 4), "nuqsgd:norm=max",
        "ef_signsgd", "ef_signsgd:block=128", "ef_signsgd:error_feedback=false",
        "onebit", "onebit:error_feedback=false",
        "topk", "topk:ratio=0.05,error_feedback=false", "topk:ratio=0.05,pattern=scatter",
        *each("topk:ratio=0.05,values={}", "fp16", "int8", "int4", "int2"), "topk:ratio=0.05,chunk=256",
        "topk:ratio=0.2 *> 0.01 @ 30",
        "random_k:ratio=0.05", "random_k:ratio=0.05,error_feedback=false", "random_k:ratio=0.05,values=int4",
        "cyclic_topk:ratio=0.05", "cyclic_topk:ratio=0.05,beta=0.5",
        "cyclic_topk:ratio=0.05,values=int4,chunk=256",
        "warmup:steps=10", "warmup:inner=(qsgd:bits=1),steps=10",
        "allocate:period=10", "allocate:budget=0.125 *> 0.01 @ 40,period=10",
        *each("dpsgd:topology={}", "ring", "complete", "star", "one_peer_exponential", "hypercube", "torus"),
        "dpsgd:order=adapt_then_combine,period=3", "dpsgd:compressor=(qsgd:bits=4)",
        "dcd", "dcd:compressor=(qsgd:bits=4),period=2", "dcd:compressor=bf16",
        "ecd", "ecd:bits=8,spacing=0.0078125", "ecd:compressor=(qsgd:bits=8),allow_relative=true",
        "choco", "choco:compressor=(topk:ratio=0.1),gamma=0.2", "choco:compressor=(qsgd:bits=1)",
        "choco:topology=exponential,period=2",
        "deepsqueeze", "deepsqueeze:compressor=(qsgd:bits=1),eta=0.05",
        "local_sgd", "local_sgd:period=1", "local_sgd:period=1 -> 8 @ 20",
        "sparse_averaging", "sparse_averaging:schedule=round_robin",
        *each("pqasgd:period=4,bits={}", 1, 2, 4, 8), "pqasgd:period=4,schedule=round_robin",
        *each("pqasgd:period=4,pattern={}", "gather", "scatter"),
        "pqasgd:period=4,bits=2,error_feedback=true",
        "post_local_sgd:period=8,after=10",
        "diloco:period=10", "diloco:period=10,nesterov=false,compressor=(qsgd:bits=4)",
        "diloco:period=5,outer_momentum=0.0,compressor=(topk:ratio=0.05)",
        "streaming_diloco:period=8", "streaming_diloco:period=10,fragments=2,overlap=3,alpha=0.25",
        "sparse_loco:period=5", "sparse_loco:period=5,ratio=0.1,chunk=64,values=fp32,outer_momentum=0.9",
        "sparta", "sparta:share=0.1,period=2",
        "hierarchical:period=4,across=(local_sgd:period=16)",
        "hierarchical:period=4,across=(diloco:period=10,compressor=(qsgd:bits=4))",
    ]
}  # fmt: skip
"""Name -> the text that :func:`distcomp.methods.parse` reads. When a word changes, change the text, never the
name."""

# --- Inputs ---


def noise(stream: int, step: int, count: int) -> np.ndarray:
    """``count`` float32 numbers about -4 to 4, of a bell's shape: sums of four 16-bit pieces of a hash of the
    element's number (splitmix64), over 2**15. Exact: no rounding, no generator, no library."""
    with np.errstate(over="ignore"):
        word = np.arange(count, dtype=np.uint64)
        word += np.uint64((stream << 48) + (step << 32) + 1)
        word *= np.uint64(0x9E3779B97F4A7C15)
        word ^= word >> np.uint64(30)
        word *= np.uint64(0xBF58476D1CE4E5B9)
        word ^= word >> np.uint64(27)
        word *= np.uint64(0x94D049BB133111EB)
        word ^= word >> np.uint64(31)
    pieces = [(word >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48)]
    total = sum(piece.astype(np.int64) for piece in pieces) - 4 * 0x8000
    exact: np.ndarray = total.astype(np.float32) / np.float32(2**15)
    return exact


class Inputs:
    """Every rank's vector in every step: half common to all, half its own, each parameter with a magnitude
    of its own; made once for all rows."""

    def __init__(self) -> None:
        counts = [int(np.prod(shape)) for _, shape in SHAPES]
        self.numel = sum(counts)
        magnitude = [np.full(count, 4.0 ** -(index % 4)) for index, count in enumerate(counts)]
        self.magnitude = np.concatenate(magnitude).astype(np.float32)
        self._made: dict[tuple[int, int], torch.Tensor] = {}

    def of(self, rank: int, step: int) -> torch.Tensor:
        """A copy: whoever is given it may write in it."""
        if (rank, step) not in self._made:
            both = noise(1, step, self.numel) + noise(2 + rank, step, self.numel)
            self._made[rank, step] = torch.from_numpy(both * np.float32(0.5) * self.magnitude)
        return self._made[rank, step].clone()


# --- Digests ---


def digests(text: str, size: int, inputs: Inputs, steps: int = STEPS) -> dict[str, Any]:
    """One row."""
    try:
        world = world_of(text, size)
        hashes: dict[str, Any] = {}
        first: dict[str, str] = {}
        sent: list[dict[str, list[int]]] = []
        before = totals(world)
        for step in range(steps):
            for name, tensors in world.step([inputs.of(rank, step) for rank in range(size)]).items():
                digest = hashes.setdefault(name, hashlib.sha256())
                for tensor in tensors:
                    digest.update(tensor.detach().contiguous().numpy().tobytes())
                first.setdefault(name, digest.hexdigest())
            now = totals(world)
            sent.append(difference(now, before))
            before = now
    except distcomp.DistcompError:
        return {"refused": True}
    last = {name: digest.hexdigest() for name, digest in hashes.items()}
    return {"first_step": first, "all_steps": last, "sent_bytes": run_lengths(sent)}


def totals(world: GradientWorld | AveragingWorld) -> list[dict[str, int]]:
    return [dict(counted) for counted in world.sent_bytes()]


def difference(now: list[dict[str, int]], before: list[dict[str, int]]) -> dict[str, list[int]]:
    """By kind, each rank's bytes of one step."""
    kinds = sorted({kind for counted in now for kind in counted})
    rows = {
        kind: [int(a.get(kind, 0) - b.get(kind, 0)) for a, b in zip(now, before, strict=True)]
        for kind in kinds
    }
    return {kind: row for kind, row in rows.items() if any(row)}


def run_lengths(sent: list[dict[str, list[int]]]) -> list[list[Any]]:
    """``[steps, bytes]`` for each run of steps that sent alike."""
    return [[len(list(run)), alike] for alike, run in itertools.groupby(sent)]


def all_rows(only: Callable[[str], bool]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row that ``only`` accepts, with its name; a method without a row of its own runs at its
    defaults."""
    shown = {text.partition(":")[0] for text in ROWS.values()}
    texts = {**ROWS, **{name: name for name in registered() if name not in shown}}
    inputs = Inputs()
    for name, text in texts.items():
        for size in SIZES:
            if only(row := f"{name} | {size} ranks"):
                yield row, {"method": text, **digests(text, size, inputs)}


COMPARED = ("refused", "first_step", "all_steps", "sent_bytes")


def compare(old: Mapping[str, Any], new: Mapping[str, Any], every: bool) -> int:
    """Print what differs, row by row; the number of rows that differ or are gone. ``every``: the equal ones,
    too."""
    wrong = 0
    for row in {**old, **new}:
        if row not in old:
            print(f"new        {row}")
            continue
        differing = [key for key in COMPARED if old[row].get(key) != new.get(row, {}).get(key)]
        if row not in new:
            print(f"gone       {row}")
        elif differing:
            print(f"different  {row}: {', '.join(differing)}")
        elif every:
            print(f"equal      {row}")
        wrong += bool(differing)
    print(
        f"{len(old) - wrong} of {len(old)} rows are equal bit for bit, {len(new.keys() - old.keys())} are new"
    )
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the digests")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with these digests")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows whose name holds TEXT")
    parser.add_argument("--every", action="store_true", help="print equal rows, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    made = dict(all_rows(lambda row: options.only in row))
    if options.write:
        document = {**surroundings(Path(__file__).parent), "steps": STEPS, "seed": SEED, "rows": made}
        options.write.write_text(json.dumps(document, separators=(",", ":")).replace('},"', '},\n"') + "\n")
    if not options.against:
        print(f"{len(made)} rows, {sum('refused' in row for row in made.values())} refused")
        return 0
    old = json.loads(options.against.read_text())["rows"]
    return int(compare({row: old[row] for row in old if options.only in row}, made, options.every) > 0)


if __name__ == "__main__":
    sys.exit(main())
