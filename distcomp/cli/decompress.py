"""``distcomp decompress``: the state dict in a ``.dcz`` file."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

from distcomp.cli.outputs import write_output
from distcomp.errors import DistcompError


def add(commands: Any) -> None:
    """Describe the command."""
    parser = commands.add_parser("decompress", help="the model in a compressed file")
    parser.add_argument("file", type=Path, metavar="FILE", help="what distcomp compress wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="MODEL", help="for torch.load")
    parser.add_argument(
        "--limit", type=int, default=1 << 30, metavar="BYTES", help="refuse larger models (default: 1 GiB)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the state dict."""
    import torch

    from distcomp.pruning import decompress

    try:
        with arguments.file.open("rb") as file:
            state = decompress(file, arguments.limit)
    except OSError as error:
        raise DistcompError(f"{arguments.file} cannot be read ({error}); name a file") from None
    memory = io.BytesIO()
    torch.save(state, memory)
    write_output(arguments.output, memory.getbuffer(), b"PK\x03\x04", "model that torch.save wrote")
    print(f"{len(state)} tensors: {arguments.output}")
    return 0
