"""Any method with its residuals in fewer bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from distcomp.errors import DistcompError
from distcomp.methods.base import Method
from distcomp.methods.feedback import ErrorFeedback
from distcomp.methods.registry import method_of
from distcomp.methods.residuals import check_form
from distcomp.methods.scheduled import Scheduled


def compact_residuals(method: Method | str, form: str = "bf16") -> Method:
    """``method`` with all residuals of its error feedback in ``form``: ``bf16`` or ``int8``.

    Rounded at random, ``E[kept] = residual``; see :class:`distcomp.methods.ErrorFeedback`. On the wire:
    ``method``'s bytes. Memory: 2 or 1.01 bytes in the place of 4 for each number. A checkpoint holds the same
    numbers in float32.

    Raises DistcompError for a method without error feedback, and for another form.
    """
    check_form(form)
    chosen = method_of(method)
    if not any(isinstance(part, ErrorFeedback) for part in chosen.walk()):
        raise DistcompError(f"{chosen} keeps no residual of error feedback; leave compact_residuals out")
    return _compact(chosen, form)


def _compact(method: Method, form: str) -> Method:
    if isinstance(method, Scheduled):
        recipe = method.recipe

        def compacted(**values: Any) -> Method:
            return _compact(recipe(**values), form)

        return replace(method, recipe=compacted)
    children: dict[str, Any] = {name: _compact(child, form) for name, child in method.children().items()}
    changed = replace(method, **children) if children else method  # type: ignore[type-var]  # a dataclass
    return replace(changed, kept=form) if isinstance(changed, ErrorFeedback) else changed
