"""Is there a file that crashes the reader of .dcz files, or makes it take memory without bound?

    python -m benchmarks.fuzz_container            # writes results/fuzz_container.json

Hypothesis draws files: good ones with bytes replaced, cut short, their checksums mended or not, and noise
behind a good start. Each is read or refused with a DistcompError; all else counts as a crash. The process's
peak of memory is taken before and after.
"""

from __future__ import annotations

import time

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from benchmarks._common import arguments_of, write
from benchmarks._fuzz import Tally, peak_bytes
from tests.pruning import fuzz

EDITS = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6)
FILES = st.one_of(
    st.builds(fuzz.mutated, st.integers(0, 2), EDITS, st.integers(0, 50), st.booleans()),
    st.builds(b"dcz1\x01\x00\x00\x00".__add__, st.binary(max_size=300)),
    st.binary(max_size=300),
)


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--inputs", type=int, default=20_000)
    inputs = parser.parse_args().inputs
    torch.set_num_threads(1)
    tally = Tally(fuzz.try_to_read, "read", "refused")

    @settings(
        max_examples=inputs, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(FILES)
    def feed(data: bytes) -> None:
        tally.feed(data)

    fuzz.try_to_read(fuzz.seeds()[0])
    before, began_s = peak_bytes(), time.perf_counter()
    feed()
    result = {
        **tally.result(), "limit_bytes": fuzz.LIMIT_BYTES,
        "peak_before_bytes": before, "peak_bytes": peak_bytes(), "seconds": time.perf_counter() - began_s,
    }  # fmt: skip
    print(result)
    write("fuzz_container", result)
    tally.check("files crashed the reader")


if __name__ == "__main__":
    main()
