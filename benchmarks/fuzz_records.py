"""Is there a record of a run that crashes the report, or is reported wrong?

    python -m benchmarks.fuzz_records              # writes results/fuzz_records.json

The record of a run of two ranks, with one to three things in it replaced, cut, renamed, lost or scribbled
over, beside the record of a sound one. Each is refused with a DistcompError or reported: as a table, a page
whose coordinates are finite, and JSON, in which the sound run's figures are what they are without the other.
All else counts as a crash. The process may not take more memory than ``limit_bytes`` of addresses.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks._common import arguments_of
from benchmarks._fuzz import Tally, fuzz
from tests.report import record_fuzz


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        cases = record_fuzz.cases(wanted.inputs, wanted.seed, Path(directory))
        fuzz("fuzz_records", Tally(record_fuzz.try_to_report, "reported", "refused"), cases, wanted.seed)


if __name__ == "__main__":
    main()
