"""Does it install, alone and with each extra, and does importing it cost anything?

python -m benchmarks.install [EXTRA ...]     # all of them, if none is named; writes results/install.json

Builds sdist and wheel, makes an environment that holds PyTorch and nothing else, installs the wheel, and
measures what ``import distcomp`` adds to ``import torch``, with the network forbidden. Then every extra is
installed into an environment of its own, ``pip check`` looks at it, and what the code asks of the extra is
imported.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._common import arguments_of, call, median, write
from benchmarks._places import ROOT

TORCH = re.search(r"torch==[\d.]+", (ROOT / "scripts" / "_venv.sh").read_text())[0]
COMPILES = {"horovod": "built by a script of its own"}
REPEATS = 7

ALONE = """
import socket, sys, time
def forbidden(*_, **__):
    raise AssertionError("importing distcomp opens a socket")
import numpy, torch
assert "distcomp" not in sys.modules
socket.socket.connect = socket.getaddrinfo = forbidden
began_s = time.perf_counter()
import distcomp
imported_s = time.perf_counter()
distcomp.attach
print(imported_s - began_s, time.perf_counter() - imported_s)
assert not torch.cuda.is_initialized()
"""


def pip(python: Path, *arguments: str | Path) -> str:
    return call([python, "-m", "pip", "--disable-pip-version-check", *arguments])


def environment(folder: Path, beside: Path | None = None) -> Path:
    """The Python of a new environment; it sees what is installed in ``beside``, too."""
    call([sys.executable, "-m", "venv", folder])
    (packages,) = (folder / "lib").glob("python*/site-packages")
    if beside is not None:
        (seen,) = (beside.parents[1] / "lib").glob("python*/site-packages")
        (packages / "beside.pth").write_text(f"{seen}\n")
        pip(
            folder / "bin" / "python", "uninstall", "--quiet", "--yes", "setuptools"
        )  # an old one; torch's counts
    return folder / "bin" / "python"


def build(python: Path, folder: Path) -> dict[str, Path]:
    """sdist and wheel, the wheel made from the sdist."""
    pip(python, "install", "--quiet", "build")
    call([python, "-m", "build", "--outdir", folder, ROOT])
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def imports(python: Path) -> dict[str, Any]:
    """Seconds that importing distcomp adds to torch's, and that first using it does."""
    plain = {
        **os.environ,
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }  # else torch imports distcomp, by its entry point
    lines = [call([python, "-c", ALONE], cwd="/", env=plain).split() for _ in range(REPEATS)]
    first, then = zip(*((float(one), float(other)) for one, other in lines), strict=True)
    return {"import_s": list(first), "import_median_s": median(first), "first_use_median_s": median(then)}


def help_columns(python: Path) -> int:
    told = call([python, "-m", "distcomp", "--help"], cwd="/", env={**os.environ, "COLUMNS": "80"})
    return max(map(len, told.splitlines()))


def asked_of(extra: str) -> list[str]:
    """The modules that the code imports where the extra is there."""
    request_sizes = re.compile(rf'require\(\s*"([\w.]+)",\s*(?:extra=)?"{extra}"')
    found = {
        name for path in (ROOT / "distcomp").rglob("*.py") for name in request_sizes.findall(path.read_text())
    }
    return sorted(found)


def install(extra: str, wheel: Path, folder: Path, base: Path) -> dict[str, Any]:
    """One extra in an environment of its own, beside PyTorch."""
    python, began_s = environment(folder, base), time.perf_counter()
    pip(python, "install", "--quiet", f"{wheel}[{extra}]")
    seconds = time.perf_counter() - began_s
    for module in asked_of(extra):
        call([python, "-c", f"import {module}"], cwd="/")
    listed = json.loads(
        pip(python, "list", "--format", "json", "--path", next((folder / "lib").glob("*/site*")))
    )
    packages = {one["name"]: one["version"] for one in listed if one["name"] not in ("pip", "setuptools")}
    return {
        "seconds": round(seconds, 1),
        "imported": asked_of(extra),
        "check": pip(python, "check").strip(),
        "torch": call([python, "-c", "import torch; print(torch.__version__)"]).strip(),
        "packages": packages,
    }


def extras() -> list[str]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return [name for name in parser["options.extras_require"] if name not in COMPILES]


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("extras", nargs="*", choices=[[], *extras()], help="which (default: all)")
    wanted = parser.parse_args().extras or extras()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        builder = environment(work / "builder")
        made = build(builder, work / "dist")
        torch = environment(work / "torch")
        pip(torch, "install", "--quiet", TORCH, "numpy")
        alone = environment(work / "alone", torch)
        pip(alone, "install", "--quiet", made["wheel"])
        result: dict[str, Any] = {
            "what": "a wheel built from the sdist, in an environment that held PyTorch and NumPy alone",
            "bytes": {kind: path.stat().st_size for kind, path in made.items()},
            **imports(alone),
            "help_columns": help_columns(alone),
            "extras": {},
            "left_out": COMPILES,
        }
        for extra in wanted:
            result["extras"][extra] = install(extra, made["wheel"], work / extra, torch)
            print(extra, result["extras"][extra]["check"], file=sys.stderr)
    print(write("install", result))


if __name__ == "__main__":
    main()
