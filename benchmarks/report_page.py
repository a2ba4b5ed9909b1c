"""Is the report's page small, quick to open and usable without a mouse or a screen?

    npm install --prefix DIR axe-core puppeteer-core      # once; and a Chromium of the system's
    python -m benchmarks.report_page DIR/node_modules

20 runs (5 methods, 4 seeds) of 10,000 steps of rank 0, with 1,000 evaluations and 200 closer looks: bytes of
the page, seconds until headless Chromium has painted it, requests that leave the machine (none), axe-core's
findings at 1,400 and 390 pixels, light and dark, with all that can be opened open; stops of the Tab key, and
what each figure's buttons save. ``--shots FOLDER`` keeps the pictures. Writes results/report_axe.json; fails
where a bound is missed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._common import arguments_of, write
from distcomp import recording
from distcomp.report import compare, page
from distcomp.report.charts import Prices
from tests.report import synthetic

METHODS = ("ddp", "bf16", "qsgd:bits=8", "qsgd:bits=4", "qsgd:bits=1")
SEEDS, STEPS, LOOKS, RANKS, LAYERS = 4, 10_000, 50, 1, 12
MOST_BYTES, MOST_S = 5_000_000, 2.0
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def closer_looks(directory: Path, draw: random.Random, compressed: bool) -> None:
    """Add what a closer look would have recorded."""
    layers = {f"layers.{at}.weight": 4096 * (at + 1) for at in range(LAYERS)}
    for rank in range(RANKS):
        recorder = recording.Recorder(directory, rank)
        for step in range(0, STEPS, LOOKS):
            record: dict[str, Any] = {
                "step": step,
                "memory": {"peak_bytes": 5e8, "state_bytes": 4e6 * compressed},
            }
            if rank == 0:
                error = draw.uniform(0.2, 0.4) * compressed
                found = {"gradient_norm": draw.random(), "residual_norm": error, "error": error}
                record["parameters"] = {
                    name: {"numel": numel, "payload_bytes": numel // 2, **found}
                    for name, numel in layers.items()
                }
                record |= {"spans": spans(), "ready_s": 0.03}
            recorder.detail(**record)
        recorder.close()


def spans() -> list[list[Any]]:
    """Eight buckets of two rounds."""
    found: list[list[Any]] = []
    for bucket in range(8):
        for turn in range(2):
            begin_s = 0.006 * bucket + 0.02 * turn
            found.append(["recode" if turn else "encode", bucket, turn, begin_s, begin_s + 0.002])
            found.append(["wire", bucket, turn, begin_s + 0.002, begin_s + 0.016])
            found.append(["wait", bucket, turn, begin_s + 0.008, begin_s + 0.016])
        found.append(["decode", bucket, 1, begin_s + 0.016, begin_s + 0.018])
    return found


def made(parent: Path) -> tuple[str, float]:
    """The page of 20 runs, and the seconds that it took to read them and make it."""
    for seed in range(SEEDS):
        for method in METHODS:
            name = f"{seed}-{method.replace(':', '-')}"
            run = synthetic.training(parent / name, method, seed, STEPS, RANKS)
            closer_looks(run, random.Random(name), "qsgd" in method)
    began_s = time.perf_counter()
    runs = [recording.read_run(path) for path in recording.find_runs([parent])]
    text = page(compare(runs), prices=Prices(per_rank_hour=2.0, per_gigabyte=0.05, watts=300))
    return text, time.perf_counter() - began_s


def looked_at(page_path: Path, modules: Path, shots: Path | None) -> dict[str, Any]:
    """What headless Chromium says of a page. Raises RuntimeError where it, or a module of npm, is missing."""
    missing = [name for name in ("axe-core", "puppeteer-core") if not (modules / name).is_dir()]
    if CHROMIUM is None or shutil.which("node") is None or missing:
        raise RuntimeError(f"needs node, a Chromium and axe-core, puppeteer-core from npm in {modules}")
    script = Path(__file__).with_suffix(".js")
    command = ["node", str(script), str(page_path), CHROMIUM, *([str(shots)] if shots is not None else [])]
    environment = {**os.environ, "NODE_PATH": str(modules.resolve())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def faults(found: dict[str, Any]) -> list[str]:
    """What is wrong with it, look by look."""
    wrong = []
    for look in found["looks"]:
        at = f"{look['width']} px, {look['scheme']}"
        wrong += [f"{at}: {one['id']}: {one['help']}" for one in look["violations"]]
        if look["requests"] or look["sideways_px"] > 0 or look["stops"]["seen"] < look["stops"]["stops"]:
            wrong.append(f"{at}: {look['requests']}, {look['sideways_px']} px sideways, {look['stops']}")
        if not look["saved"]["buttons"] == 2 * look["saved"]["svg"] == 2 * look["saved"]["csv"] > 0:
            wrong.append(f"{at}: {look['saved']}")
    return wrong


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("modules", type=Path, help="node_modules with axe-core and puppeteer-core")
    parser.add_argument("--shots", type=Path, help="keep the pictures here")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        where = Path(directory)
        text, made_s = made(where / "runs")
        (where / "report.html").write_text(text, encoding="utf-8")
        found = looked_at(where / "report.html", asked.modules, asked.shots)
    size_bytes = len(text.encode())
    first_s = max(look["open_s"] for look in found["looks"])
    wrong = faults(found)
    if size_bytes > MOST_BYTES or first_s > MOST_S:
        wrong.append(f"{size_bytes} bytes, open after {first_s:.2f} s")
    about = {"runs": SEEDS * len(METHODS), "steps": STEPS, "page_bytes": size_bytes, "made_s": made_s}
    write("report_axe", {**about, "open_s": first_s, "faults": wrong, **found})
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
