"""Is there a checkpoint that crashes who loads it, or is loaded wrong?

    python -m benchmarks.fuzz_states               # writes results/fuzz_states.json

Good states of several methods, with one to three things in them replaced, cut, renamed or lost. Each is
refused with a DistcompError or loaded in the right shapes and finite; all else counts as a crash. The process
may not take more memory than ``limit_bytes`` of addresses.
"""

from __future__ import annotations

from benchmarks._common import arguments_of
from benchmarks._fuzz import Tally, fuzz
from tests.core import state_fuzz


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    cases = state_fuzz.cases(wanted.inputs, wanted.seed)
    fuzz("fuzz_states", Tally(state_fuzz.try_to_load, "loaded", "refused"), cases, wanted.seed)


if __name__ == "__main__":
    main()
