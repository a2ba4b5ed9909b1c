"""The MPI library as mpi4py finds it, and what it calls torch's types and sums."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from distcomp.errors import DistcompError, require


@cache
def library() -> Any:
    """``mpi4py.MPI``, initialized. Importing it starts MPI, so nothing does before it is asked for.

    Raises DistcompError where mpi4py or an MPI library is missing, or MPI may not be called from two threads.
    """
    require("mpi4py", "mpi")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise DistcompError(
            f"mpi4py finds no MPI library ({error}); run: pip install 'distcomp[mpi]', which brings MPICH"
        ) from error
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise DistcompError(
            "this MPI library was started without MPI_THREAD_MULTIPLE, which backward and exchange need; "
            "let mpi4py start it (mpi4py.rc.thread_level = 'multiple'), or use an MPI that offers it"
        )
    return MPI


def raw(x: Tensor) -> list[Any]:
    """The bytes of a contiguous tensor, as mpi4py takes them."""
    return [x.detach().reshape(-1).view(torch.uint8).numpy(), library().BYTE]


def addends(x: Tensor) -> list[Any]:
    """The elements of a contiguous tensor, as an MPI reduction takes them.

    Raises DistcompError for a type that MPI has no sum of.
    """
    named = _types().get(x.dtype)
    if named is None:
        raise DistcompError(f"MPI reduces no tensor of {x.dtype}; cast it to a real or whole number type")
    flat = x.detach().reshape(-1)
    return [flat.view(_HALVES.get(x.dtype, x.dtype)).numpy(), named]


def reduction(name: str, dtype: torch.dtype) -> Any:
    """The MPI operation of that name (SUM, PROD, MIN, MAX, BAND, BOR, BXOR) for tensors of a type.

    MPI has no arithmetic on float16 and bfloat16: there it is torch's, which rounds at every hop.
    """
    if dtype in _HALVES:
        return _half(name, dtype)
    return getattr(library(), name)


_HALVES = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.bool: torch.uint8}
"""What MPI is told that these are: two bytes, one byte."""

_ON_HALVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add,
    "PROD": torch.mul,
    "MIN": torch.minimum,
    "MAX": torch.maximum,
    "BAND": torch.bitwise_and,
    "BOR": torch.bitwise_or,
    "BXOR": torch.bitwise_xor,
}


@cache
def _half(name: str, dtype: torch.dtype) -> Any:
    function = _ON_HALVES[name]

    def reduce(incoming: Any, result: Any, _: object) -> None:
        a, b = torch.frombuffer(incoming, dtype=dtype), torch.frombuffer(result, dtype=dtype)
        b.copy_(function(a, b))

    return library().Op.Create(reduce, commute=True)


@cache
def _types() -> dict[torch.dtype, Any]:
    MPI = library()
    return {
        torch.float32: MPI.FLOAT,
        torch.float64: MPI.DOUBLE,
        torch.uint8: MPI.UINT8_T,
        torch.int8: MPI.INT8_T,
        torch.int16: MPI.INT16_T,
        torch.int32: MPI.INT32_T,
        torch.int64: MPI.INT64_T,
        torch.float16: MPI.INT16_T,
        torch.bfloat16: MPI.INT16_T,
        torch.bool: MPI.UINT8_T,
    }
