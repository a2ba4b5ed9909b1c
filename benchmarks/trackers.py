"""Does each tracker's own reader read back what our sink wrote?

python -m benchmarks.trackers [TRACKER ...]     # all of them, if none is named; writes results/trackers.json

Each library is installed into an environment of its own, beside PyTorch's, and the tests of
tests/integrations/test_trackers.py run there, told to be offline. Rows that are not run again stay.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._common import arguments_of, call, write
from benchmarks._places import RESULTS, ROOT
from benchmarks.install import environment, pip

TRACKERS = ("wandb", "mlflow", "trackio", "aim")
OFFLINE = {
    "WANDB_MODE": "offline",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
}


def row(tracker: str, folder: Path) -> dict[str, Any]:
    """One tracker: its version, what it brings, and what its test said."""
    python, began_s = environment(folder, Path(sys.executable)), time.perf_counter()
    pip(python, "install", "--quiet", tracker)
    took_s = time.perf_counter() - began_s
    version = call(
        [python, "-c", f"from importlib.metadata import version; print(version('{tracker}'))"]
    ).strip()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "timeout=600",
               "tests/integrations/test_trackers.py", "-k", tracker]  # fmt: skip
    plain = {**os.environ, **OFFLINE, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    # A library may draw bars before pytest's last words, and say goodbye after them.
    said = (re.findall(r"\d+ (?:passed|failed).* in [\d.]+s", done.stdout) or ["nothing"])[-1]
    print("\n".join(lines[-30:]) if done.returncode else said, file=sys.stderr)
    return {
        "version": version,
        "passed": done.returncode == 0 and said.startswith("1 passed"),
        "said": said,
        "installed_s": round(took_s, 1),
        "installed_bytes": size,
        "read_back": "payload_bytes of every step and rank, and the test loss that was logged",
    }


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("trackers", nargs="*", choices=[[], *TRACKERS], help="which (default: all)")
    wanted = parser.parse_args().trackers or TRACKERS
    path = RESULTS / "trackers.json"
    rows = json.loads(path.read_text())["trackers"] if path.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        for tracker in wanted:
            rows[tracker] = row(tracker, Path(name) / tracker)
            print(write("trackers", {"what": "sinks, read back by the library", "trackers": rows}))
    if not all(one["passed"] for one in rows.values()):
        sys.exit("some failed; the result file says which")


if __name__ == "__main__":
    main()
