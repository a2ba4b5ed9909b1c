"""distcomp: train with fewer bits. Communication compression for distributed PyTorch.

>>> model = DistributedDataParallel(model)                              # doctest: +SKIP
>>> handle = distcomp.attach(model, optimizer, distcomp.qsgd(bits=4))   # doctest: +SKIP

Here are the verbs, the errors, the rooms and the methods that are asked for most. The others are in their
rooms, ``distcomp.methods.nuqsgd``, ``distcomp.averaging.ecd``, and every one has a text:
``distcomp.parse("ecd")``.
"""

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from distcomp.registry import when_missing
from distcomp.version import __version__ as __version__

if sys.platform == "win32":
    raise ImportError("distcomp does not run on Windows; use WSL 2 (wsl --install), which is Linux")

if TYPE_CHECKING:
    from distcomp import averaging as averaging
    from distcomp import blocks as blocks
    from distcomp import calls as calls
    from distcomp import compressors as compressors
    from distcomp import conditional as conditional
    from distcomp import distill as distill
    from distcomp import methods as methods
    from distcomp import network as network
    from distcomp import precision as precision
    from distcomp import pruning as pruning
    from distcomp import structured as structured
    from distcomp import updates as updates
    from distcomp.attaching.audit import audit as audit
    from distcomp.attaching.handle import Handle as Handle
    from distcomp.attaching.handle import attach as attach
    from distcomp.attaching.target import Replicas as Replicas
    from distcomp.averaging.recipes import choco as choco
    from distcomp.averaging.recipes import dcd as dcd
    from distcomp.averaging.recipes import diloco as diloco
    from distcomp.averaging.recipes import dpsgd as dpsgd
    from distcomp.averaging.recipes import local_sgd as local_sgd
    from distcomp.averaging.recipes import post_local_sgd as post_local_sgd
    from distcomp.averaging.recipes import sparse_loco as sparse_loco
    from distcomp.averaging.recipes import streaming_diloco as streaming_diloco
    from distcomp.averaging.recipes.codistill import codistill as codistill
    from distcomp.averaging.recipes.masked import masked as masked
    from distcomp.errors import CorruptPayload as CorruptPayload
    from distcomp.errors import DistcompError as DistcompError
    from distcomp.errors import Mismatch as Mismatch
    from distcomp.errors import PeerLost as PeerLost
    from distcomp.errors import SettingsMismatch as SettingsMismatch
    from distcomp.methods import bf16 as bf16
    from distcomp.methods import dgc as dgc
    from distcomp.methods import ef_signsgd as ef_signsgd
    from distcomp.methods import fp16 as fp16
    from distcomp.methods import identity as identity
    from distcomp.methods import natural as natural
    from distcomp.methods import parse as parse
    from distcomp.methods import qsgd as qsgd
    from distcomp.methods import random_k as random_k
    from distcomp.methods import register as register
    from distcomp.methods import topk as topk
    from distcomp.methods.allocate import allocate as allocate
    from distcomp.methods.demo import demo as demo
    from distcomp.methods.ef21 import ef21 as ef21
    from distcomp.methods.fixed_point import fixed_point as fixed_point
    from distcomp.methods.gradiveq import gradiveq as gradiveq
    from distcomp.methods.onebit_adam import onebit_adam as onebit_adam
    from distcomp.methods.powersgd import powersgd as powersgd
    from distcomp.methods.two_level import two_level as two_level
    from distcomp.methods.warmup import warmup as warmup
    from distcomp.transports.rendezvous import init_process_group as init_process_group

__all__ = [
    "CorruptPayload", "DistcompError", "Handle", "Mismatch", "PeerLost", "Replicas", "SettingsMismatch",
    "allocate", "attach", "audit", "bf16", "choco", "codistill", "dcd", "demo", "dgc", "diloco", "dpsgd",
    "ef21", "ef_signsgd", "fixed_point", "fp16", "gradiveq", "identity", "init_process_group", "local_sgd",
    "masked", "natural", "onebit_adam", "parse", "post_local_sgd", "powersgd", "qsgd", "random_k",
    "register", "sparse_loco", "streaming_diloco", "topk", "two_level", "warmup",
]  # fmt: skip

ROOMS = {
    "averaging": "distcomp.averaging",
    "blocks": "distcomp.blocks",
    "calls": "distcomp.calls",
    "compressors": "distcomp.compressors",
    "conditional": "distcomp.conditional",
    "distill": "distcomp.distill",
    "methods": "distcomp.methods",
    "network": "distcomp.network",
    "precision": "distcomp.precision",
    "pruning": "distcomp.pruning",
    "structured": "distcomp.structured",
    "updates": "distcomp.updates",
}
"""The rooms that are attributes, and where each is."""

_SOURCES = (
    "distcomp.errors",
    "distcomp.methods",
    "distcomp.averaging",
    "distcomp.attaching.handle",
    "distcomp.attaching.target",
    "distcomp.transports.rendezvous",
)
"""Where the other names are, the lighter modules first."""

when_missing(lambda: importlib.import_module("distcomp.averaging"))

if not TYPE_CHECKING:  # a type checker would take every name for one that exists

    def __getattr__(name: str) -> Any:
        """A public name, when it is asked for: importing distcomp takes no time, and distcomp.network no
        torch."""
        if name in ROOMS:
            return importlib.import_module(ROOMS[name])
        if name in __all__:
            modules = map(importlib.import_module, _SOURCES)
            globals()[name] = next(getattr(module, name) for module in modules if hasattr(module, name))
            return globals()[name]
        # ``from distcomp import kernels`` asks here first: a room's import must not set off those of others.
        if name.startswith("_") or importlib.util.find_spec(f"distcomp.{name}") is not None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        rooms = [
            room for room in ("methods", "averaging") if callable(getattr(__getattr__(room), name, None))
        ]
        remedy = f"; it is distcomp.{rooms[0]}.{name}" if rooms else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{remedy}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *ROOMS})
