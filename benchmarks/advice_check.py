"""Does the method that ``distcomp advise`` names then win in emulation? And does it say no where it should?

    python -m benchmarks.advice_check            # writes results/advice_check.json

Pairs of digits (928,266 parameters), 4 ranks that share this machine: an unshaped network, and 100 Mbit/s.
First the advice, then every method of it under ``distcomp emulate``; the time of a step is the median that
the report tells.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks._common import arguments_of, call, write
from benchmarks._places import EXAMPLES
from distcomp.advice.advise import METHODS

SCRIPT = EXAMPLES / "digits.py"
RANKS = "4"


def distcomp(*arguments: str) -> str:
    return call([sys.executable, "-m", "distcomp", *arguments])


def checked(rate: str, steps: int) -> dict[str, Any]:
    """The advice for a rate, and the measured steps beside it."""
    fabric = ["--ranks", RANKS, "--rate", rate]
    methods = ";".join(METHODS)
    told = distcomp(
        "advise", *fabric, "--ranks-here", RANKS, "--json", "--methods", methods, "--model", str(SCRIPT)
    )
    advice = json.loads(told)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "advice.json").write_text(told)
        given = ["--steps", str(steps), "--eval-every", str(steps)]
        distcomp("emulate", *fabric, "--methods", methods, "-o", f"{folder}/runs", str(SCRIPT), *given)
        report = distcomp("report", f"{folder}/runs", "--advice", f"{folder}/advice.json", "--json")
    beside = json.loads(report)["predicted"]
    return {
        "rate": rate,
        "recommended": advice["recommended"],
        "sentence": advice["sentence"],
        "fastest_measured": min(beside, key=lambda one: one["measured_s"])["method"],
        "steps": beside,
    }


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    cells = [checked(rate, arguments.steps) for rate in ("unshaped", "100mbit")]
    write("advice_check", {"what": __doc__.splitlines()[0], "ranks": int(RANKS), "cells": cells})
    for one in cells:
        print(f"{one['rate']}: advised {one['recommended']}, fastest in emulation {one['fastest_measured']}")


if __name__ == "__main__":
    main()
