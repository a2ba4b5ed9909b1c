"""Is there a text of a method that crashes who reads it, or makes a method that cannot work?

    python -m benchmarks.fuzz_texts                # writes results/fuzz_texts.json

Texts of all methods with odd values, doubled and misspelt settings, methods within methods, and characters
scribbled over. Each is refused with a DistcompError of one line, or makes a method that its own text makes
again and that carries what two workers have, finite. All else counts as a crash. The process may not take
more memory than ``limit_bytes`` of addresses.
"""

from __future__ import annotations

from benchmarks._common import arguments_of
from benchmarks._fuzz import Tally, fuzz
from tests.registry import text_fuzz


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    cases = text_fuzz.cases(wanted.inputs, wanted.seed)
    tally = Tally(text_fuzz.try_to_use, "used", "refused", "refused when used")
    fuzz("fuzz_texts", tally, cases, wanted.seed)


if __name__ == "__main__":
    main()
