"""Which backend serves which device: decided once per device, never silently.

A CPU tensor goes to the C extension, a CUDA tensor to Triton. Where the one meant for a device is missing,
the reference serves it and one warning says so and how to mend it. ``DISTCOMP_KERNELS`` forces a backend;
then a missing one is an error. It is read once: a step asks dozens of times.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.kernels.packing import Coding

BACKENDS = ("reference", "cpu", "triton")
REMEDIES = {
    "cpu": "install a C compiler and Python's headers (gcc, python3-dev), then distcomp once more, with "
    "pip's --force-reinstall --no-deps --no-cache-dir",
    "triton": "pip install triton",
}


class Backend(Protocol):
    """What a backend module defines; the meaning is in :mod:`distcomp.kernels`."""

    def quantize(
        self, x: Tensor, codes: Tensor, scales: Tensor, *,
        block: int, bits: int, key: int, first: int, coding: Coding,
    ) -> None: ...  # fmt: skip

    def dequantize(
        self, codes: Tensor, scales: Tensor, out: Tensor, *,
        block: int, bits: int, powers: bool, sign: int, times: float,
    ) -> None: ...  # fmt: skip

    def all_finite(self, x: Tensor) -> bool: ...

    def checksum(self, data: Tensor) -> int: ...

    def permuted(self, count: int, numel: int, keys: tuple[int, ...]) -> Tensor: ...

    def exponents(self, x: Tensor, codes: Tensor, *, key: int, first: int) -> None: ...

    def scale_by_exponents(self, codes: Tensor, out: Tensor) -> None: ...


def backend(device: str | torch.device = "cpu") -> str:
    """Name of the backend that serves tensors on ``device``: "cpu", "triton" or "reference"."""
    return _choose(torch.device(device).type, forced())


def implementation(device: torch.device) -> Backend:
    """The module behind :func:`backend`."""
    return _load(_choose(device.type, forced()))


def served_by_c(x: Tensor) -> bool:
    """Whether the C extension serves this tensor."""
    return x.is_cpu and _choose("cpu", forced()) == "cpu"


@cache
def forced() -> str:
    """The backend that the environment names; empty where it names none."""
    return os.environ.get("DISTCOMP_KERNELS", "")


@cache
def _choose(device_type: str, named: str) -> str:
    if named:
        return _forced(device_type, named)
    meant = {"cpu": "cpu", "cuda": "triton"}.get(device_type)
    if meant is None:
        return "reference"
    try:
        _load(meant)
    except ImportError as error:
        warnings.warn(
            f"distcomp's {meant} kernels are not available ({error}); the plain-torch reference gives the "
            f"same numbers many times slower; to mend: {REMEDIES[meant]}",
            RuntimeWarning,
            stacklevel=4,
        )
        return "reference"
    return meant


def _forced(device_type: str, forced: str) -> str:
    if forced not in BACKENDS:
        raise DistcompError(f"DISTCOMP_KERNELS={forced} is no backend; choose one of {', '.join(BACKENDS)}")
    interpreted = forced == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if forced != "reference" and not interpreted and device_type != {"cpu": "cpu", "triton": "cuda"}[forced]:
        raise DistcompError(
            f"DISTCOMP_KERNELS={forced} cannot serve a tensor on {device_type}; unset it, or use reference"
        )
    try:
        _load(forced)
    except ImportError as error:
        raise DistcompError(
            f"DISTCOMP_KERNELS={forced} but those kernels are not available ({error}); {REMEDIES[forced]}"
        ) from error
    return forced


@cache
def _load(name: str) -> Backend:
    return cast(Backend, import_module(f"distcomp.kernels.{name}"))
