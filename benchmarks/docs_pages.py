"""Can the docs be read without a mouse or a screen, on a phone, and in the dark?

    npm install --prefix DIR axe-core puppeteer-core      # once; and a Chromium of the system's
    scripts/check docs                                    # builds docs/_build/html
    python -m benchmarks.docs_pages DIR/node_modules

Ten pages at 1,400 and 390 pixels, light and dark: axe-core's findings, whether a page is wider than the
window, pictures that are not there, requests that leave the machine. ``--shots FOLDER`` keeps the pictures.
Writes results/docs_axe.json; fails where anything is found.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from benchmarks._common import arguments_of, write
from benchmarks._places import ROOT
from benchmarks.report_page import CHROMIUM

BUILT = ROOT / "docs" / "_build" / "html"
PAGES = (
    "index",
    "start",
    "how/choose",
    "methods",
    "compressors",
    "pareto",
    "reference/distcomp.attach",
    "troubleshooting",
    "tutorial",
    "versions",
)
"""Pages of each kind: written by hand, by the code, with figures, of a notebook, with wide tables."""


def looked_at(pages: list[str], modules: Path, shots: Path | None) -> dict[str, Any]:
    """What headless Chromium says. Raises RuntimeError where it, or a module of npm, is missing."""
    missing = [name for name in ("axe-core", "puppeteer-core") if not (modules / name).is_dir()]
    if CHROMIUM is None or shutil.which("node") is None or missing:
        raise RuntimeError(f"needs node, a Chromium and axe-core, puppeteer-core from npm in {modules}")
    files = [str(BUILT / f"{page}.html") for page in pages]
    script = Path(__file__).with_suffix(".js")
    command = ["node", str(script), CHROMIUM, str(shots) if shots is not None else "-", *files]
    environment = {**os.environ, "NODE_PATH": str(modules.resolve())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout)
    found["pages"] = dict(zip(pages, found["pages"], strict=True))
    return found


def faults(pages: dict[str, Any]) -> list[str]:
    """What is wrong, page by page and look by look."""
    wrong = []
    for page, looks in pages.items():
        for look in looks:
            at = f"{page}, {look['width']} px, {look['scheme']}"
            wrong += [f"{at}: {one['id']} ({one['count']}): {one['help']}" for one in look["violations"]]
            if look["sideways_px"] > 0 or look["lost"] or look["requests"]:
                wrong.append(f"{at}: {look['sideways_px']} px sideways, {look['lost']}, {look['requests']}")
    return wrong


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("modules", type=Path, help="node_modules with axe-core and puppeteer-core")
    parser.add_argument("--shots", type=Path, help="keep the pictures here")
    parser.add_argument("--pages", nargs="+", default=list(PAGES), help="without .html (default: ten)")
    asked = parser.parse_args()
    found = looked_at(asked.pages, asked.modules, asked.shots)
    wrong = faults(found["pages"])
    write("docs_axe", {"faults": wrong, **found})
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
