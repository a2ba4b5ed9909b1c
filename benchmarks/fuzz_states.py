"""Is there a checkpoint that crashes who loads it, or is loaded wrong?

    python -m benchmarks.fuzz_states               # writes results/fuzz_states.json

Good states of several methods, with one to three things in them replaced, cut, renamed or lost. Each is
refused with a DistcompError or loaded in the right shapes and finite; all else counts as a crash. The process
may not take more memory than ``limit_bytes`` of addresses.
"""

from __future__ import annotations

import resource
import sys
import traceback
from collections import Counter

import torch

from benchmarks._common import arguments_of, write
from tests.core import state_fuzz

LIMIT_BYTES = 8 << 30


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    became: Counter[str] = Counter(loaded=0, refused=0, crashed=0)
    for case in state_fuzz.cases(wanted.inputs, wanted.seed):
        try:
            became[state_fuzz.try_to_load(*case)] += 1
        except Exception:
            became["crashed"] += 1
            print(case, traceback.format_exc(), sep="\n", file=sys.stderr)
    result = {"inputs": sum(became.values()), **became, "limit_bytes": LIMIT_BYTES}
    print(result)
    write("fuzz_states", result, wanted.seed)
    if became["crashed"]:
        raise SystemExit(f"{became['crashed']} checkpoints crashed who loaded them; they are printed above")


if __name__ == "__main__":
    main()
