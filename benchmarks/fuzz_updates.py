"""Is there an update that crashes who applies it, or is applied wrong?

    python -m benchmarks.fuzz_updates              # writes results/fuzz_updates.json

Good updates and key frames with bytes replaced, cut, doubled or moved, their checksums mended or not; blocks
and tables that are well sealed and wrong; noise. Each is applied, to the very state that it promises, or
refused with a DistcompError and nothing changed; all else counts as a crash. The process may not take more
memory than ``limit_bytes`` of addresses.
"""

from __future__ import annotations

from benchmarks._common import arguments_of
from benchmarks._fuzz import Tally, fuzz
from tests.updates import update_fuzz


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    cases = update_fuzz.cases(wanted.inputs, wanted.seed)
    fuzz("fuzz_updates", Tally(update_fuzz.try_to_apply, "applied", "refused"), cases, wanted.seed)


if __name__ == "__main__":
    main()
