"""A state dict as a ``.safetensors`` file, which any other framework reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from distcomp.atomic_write import write_chunks
from distcomp.errors import DistcompError
from distcomp.updates.encode import ModelOrState
from distcomp.updates.pieces import tensors_of

SAFETENSORS_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
}  # fmt: skip
ALIGNED_BYTES = 8


def save_safetensors(state: ModelOrState, path: str | Path) -> None:
    """Write a model's tensors, whole or not at all: 8 bytes of length, a header of JSON, the tensors in order
    of name.

    Names that share memory are written each, as other frameworks expect. One tensor at a time is copied where
    it is not on the CPU. Raises DistcompError for a dtype that the format lacks, and for sharded tensors.
    """
    tensors = dict(sorted(tensors_of(state).items()))
    entries, at = {}, 0
    for name, tensor in tensors.items():
        if tensor.dtype not in SAFETENSORS_DTYPES or hasattr(tensor, "to_local"):
            raise DistcompError(
                f"{name} is a {type(tensor).__name__} of {tensor.dtype}; gather or convert it first"
            )
        entries[name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.numel() * tensor.element_size()],
        }
        at += tensor.numel() * tensor.element_size()
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % ALIGNED_BYTES)

    def chunks() -> Iterator[bytes | memoryview]:
        yield len(header).to_bytes(8, "little") + header
        for tensor in tensors.values():
            if tensor.numel():
                yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    write_chunks(Path(path), chunks())
