"""``distcomp compress``: a trained model as a small file."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distcomp.cli.outputs import write_output
from distcomp.cli.tables import fitted
from distcomp.errors import DistcompError

DESCRIPTION = """\
Deep Compression (Han et al. 2016): active weights share 2^bits values, and
both values and places are coded. MODEL is a state dict that torch.save wrote.
Prune first (distcomp.pruning): what is zero costs next to nothing.
"""


def add(commands: Any) -> None:
    """Describe the command."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        "compress", help="a model as a small file", description=DESCRIPTION, formatter_class=plain
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="state dict, as torch.save writes it")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="such as model.dcz")
    parser.add_argument("--bits", type=int, default=5, help="2^bits shared values per tensor (default: 5)")
    parser.add_argument(
        "--dct",
        metavar="K,T,L",
        help="pack convolution kernels by frequency (CNNpack): clusters, threshold in standard "
        "deviations, levels, "
        "such as 16,0.5,32",
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the file and say what each tensor takes."""
    from distcomp.pruning import compress, decompress, sizes

    state = read_state(arguments.model)
    dct = pack_of(arguments.dct)
    data = compress(state, arguments.bits, dct)
    again = decompress(data, limit_bytes=1 << 62)
    # Frequencies are rounded anew whenever they are packed: there the tensors must be read back, as they are.
    same = compress(again, arguments.bits) == data if dct is None else list(again) == list(state)
    if not same:
        raise DistcompError("what was coded does not read back as it was; please report this model")
    write_output(arguments.output, data, b"dcz1", ".dcz file")
    if arguments.json:
        tensors = [asdict(one) for one in sizes(data)]
        print(json.dumps({"file": str(arguments.output), "bytes": len(data), "tensors": tensors}, indent=2))
        return 0
    rows = [[one.name, f"{one.dense_bytes}", f"{one.stored_bytes}", one.coding] for one in sizes(data)]
    print(fitted(["tensor", "bytes", "stored", "coding"], rows))
    dense = sum(size.dense_bytes for size in sizes(data))
    smaller = f"{dense / len(data):.1f} x smaller"
    print(f"\n{dense} bytes of tensors -> {len(data)} bytes, {smaller}:\n{arguments.output}")
    return 0


def pack_of(text: str | None) -> Any:
    """``16,0.5,32`` -> a :class:`distcomp.files.dct_pack.DctPack`; None where nothing is asked for."""
    from distcomp.files.dct_pack import DctPack

    if text is None:
        return None
    try:
        clusters, threshold, levels = text.split(",")
        return DctPack(int(clusters), float(threshold), int(levels))
    except ValueError:
        raise DistcompError(
            f"--dct takes clusters, threshold and levels, such as 16,0.5,32, not {text!r}"
        ) from None


def read_state(path: Path) -> dict[str, Any]:
    """The tensors of a saved state dict. Nothing but tensors is read."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DistcompError(f"{path} cannot be read ({error.strerror}); name a saved state dict") from None
    except Exception:  # torch.load raises many kinds for a file that is none of its own
        raise DistcompError(
            f"{path} is no saved state dict (torch reads no tensors from it without running code of the "
            "file's); write one: torch.save(model.state_dict(), ...)"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(one, torch.Tensor) for one in state.values()):
        raise DistcompError(
            f"{path} holds more than tensors by name; save distcomp.pruning.plain_state(model) or "
            "model.state_dict()"
        )
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise DistcompError(f"{path} has {name!r} for a name; name its tensors by text")
        if tensor.layout != torch.strided or tensor.is_meta:
            kind = "no values (it is on the meta device)" if tensor.is_meta else f"the layout {tensor.layout}"
            raise DistcompError(f"{name} has {kind}; save dense tensors: tensor.to_dense()")
    masked = next((name for name in state if ".parametrizations." in f".{name}"), None)
    if masked is not None:
        raise DistcompError(
            f"{masked} has a mask beside it; save distcomp.pruning.plain_state(model), which applies it"
        )
    return state
