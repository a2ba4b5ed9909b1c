"""Which method runs, and who chose it: the script, or ``DISTCOMP_METHOD``. The record of a run says what was
attached, never what was asked for."""

from __future__ import annotations

import os
import warnings
from typing import Any

from torch import nn

from distcomp.errors import DistcompError
from distcomp.methods import parse
from distcomp.methods.active_only import ActiveOnly
from distcomp.recording import METHOD, Recorder


def record_attached(
    recorder: Recorder | None, rank: int, model: nn.Module, given: Any, chosen: Any, seed: int
) -> None:
    """Tell a run's record, if there is one, what was attached to the model."""
    if recorder is not None:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        recorder.note(seed=seed, parameters=parameters, **_note(given, chosen, rank))


def _note(given: Any, chosen: Any, rank: int) -> dict[str, Any]:
    """What the record says of the method ``chosen``, which ``attach`` was ``given`` as an object, as text, or
    not at all: ``method``, in the words of ``DISTCOMP_METHOD`` where that names the same method, and
    ``method_from``, ``"script"`` or ``"environment"``. The very text of the environment is taken for handed
    on, as examples/digits.py does, and so is a method that carries what it asks for, of active parameters.

    Warns on rank 0 where the environment asks for another method than the script names.
    """
    asked = os.environ.get(METHOD)
    if given is None or given == asked or _is_around(given, asked):
        return {"method": asked, "method_from": "environment"}
    same = asked is not None and _is(asked, chosen)
    if asked is not None and not same and rank == 0:
        warnings.warn(
            f"{METHOD}={asked} asks for another method than the script attaches, and the script's own runs; "
            "to have it run another, leave the method out: distcomp.attach(model, optimizer)",
            stacklevel=4,  # where attach was called
        )
    own = given if isinstance(given, str) else str(chosen)
    return {"method": asked if same else own, "method_from": "script"}


def _is_around(given: Any, asked: str | None) -> bool:
    """Whether a method of active parameters alone carries what was asked for."""
    return asked is not None and isinstance(given, ActiveOnly) and _is(asked, given.inner)


def _is(text: str, chosen: Any) -> bool:
    """Whether a text names the method that was chosen, in whatever spelling."""
    if isinstance(chosen, str) or text == chosen:
        return bool(text == chosen)
    try:
        return repr(parse(text)) == repr(chosen)
    except DistcompError:  # one of PyTorch's own, or a name that is not known here
        return False
