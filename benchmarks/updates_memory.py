"""How much memory does an update take, and how long?

    python -m benchmarks.updates_memory            # writes results/updates_memory.json

A model of bfloat16 weights in tensors of several sizes, the largest a third of it; at a share of changed
words as training at small rates has it, at one of a quarter, and whole (a key frame). Each measurement is a
process of its own: the peak of its resident memory, less what it had before the model was made, over the
model's size. ``encode`` holds the version before and the version after; ``apply`` the state and the update.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks._common import arguments_of, rank_environment, write

WORDS = 48 << 20
SHAPES = {"embedding": WORDS // 3, **{f"layers.{i}": WORDS // 24 for i in range(16)}}
SHARES = {"0.4 % changed": 0.004, "key frame": None, "25 % changed": 0.25}


def current_bytes() -> int:
    """Resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def made(changed: float | None) -> dict[str, Tensor]:
    """The model, some of its words one unit further; made without a second copy."""
    state = {}
    for seed, (name, numel) in enumerate(SHAPES.items()):
        tensor = torch.empty(numel, dtype=torch.bfloat16)
        tensor.normal_(generator=torch.Generator().manual_seed(seed))
        if changed:
            places = torch.randint(
                numel, (int(changed * numel),), generator=torch.Generator().manual_seed(99)
            )
            for some in places.split(1 << 20):
                tensor.view(torch.int16)[some] += 1
        state[name] = tensor
    return state


def measure(task: str, share: float | None, path: Path) -> dict[str, Any]:
    """One measurement, in this process: of encode, which leaves the update behind, or of apply."""
    from distcomp import updates

    torch.set_num_threads(1)
    small = {"w": torch.zeros(99)}  # what is imported on the way is none of the model's memory
    updates.apply(small, updates.read_update(updates.encode(small, {"w": torch.ones(99)}).to_bytes()))
    before = current_bytes()
    if task == "encode":
        old, new = (None if share is None else made(None)), made(share)
        began_s = time.perf_counter()
        update = updates.encode(old, new, entropy="zlib")
        seconds = time.perf_counter() - began_s
        (updates.UpdateDirectory(path)).write([update])
        size = update.nbytes
    else:
        state = made(None)
        (stored,) = updates.UpdateDirectory(path).versions()
        began_s = time.perf_counter()
        update = updates.UpdateDirectory(path).read(stored)
        updates.apply(state, update)
        seconds, size = time.perf_counter() - began_s, update.nbytes
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"copies": (peak - before) / (2 * WORDS), "seconds": seconds, "update_bytes": size}


def in_a_process(task: str, share: float | None, path: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.updates_memory",
        "--measure",
        json.dumps([task, share, path]),
    ]
    done = subprocess.run(
        command, env={**_environment(), **rank_environment(None)}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _environment() -> dict[str, str]:
    import os

    # A block that was freed goes back to the system: what is counted is what is held.
    return {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--measure", help="one of the measurements, by a process that this script starts")
    wanted = parser.parse_args()
    if wanted.measure:
        task, share, path = json.loads(wanted.measure)
        print(json.dumps(measure(task, share, Path(path))))
        return
    rows: dict[str, dict[str, Any]] = {}
    for name, share in SHARES.items():
        with TemporaryDirectory() as path:
            encoded, applied = (in_a_process(task, share, path) for task in ("encode", "apply"))
        rows[name] = {
            "smaller": 2 * WORDS / encoded["update_bytes"],
            "encode_copies": encoded["copies"], "apply_copies": applied["copies"],
            "encode_s_per_gb": encoded["seconds"] / (2 * WORDS) * 1e9,
            "apply_s_per_gb": applied["seconds"] / (2 * WORDS) * 1e9,
        }  # fmt: skip
        print(name, rows[name])
        write("updates_memory", {"model_bytes": 2 * WORDS, "rows": rows})


if __name__ == "__main__":
    main()
