"""What the training loop sees and hands to the methods: masks, and parameters that are not trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from distcomp.active import FROZEN, NOTHING_OBSERVED, ActiveParameters, Observed

if TYPE_CHECKING:
    from distcomp.pruning.pruner import Pruner


def sources_of(method: Any) -> list[ActiveParameters]:
    """The sources of active parameters of a method, of those within it, and of those they consist of."""
    if isinstance(method, tuple):
        return [source for each in method for source in sources_of(each)]
    if not is_dataclass(method) or isinstance(method, type):
        return []
    inside = [source for field in fields(method) for source in sources_of(getattr(method, field.name))]
    return [method, *inside] if isinstance(method, ActiveParameters) else inside


def pruners_of(method: Any) -> list[Pruner]:
    """The pruners whose masks a method, or one within it, follows."""
    sources = sources_of(method)
    if not sources:
        return []
    # Where nothing is pruned, attaching does not wait for the room of pruning to be imported.
    from distcomp.pruning.active import ActiveMasks
    from distcomp.pruning.pruner import pruner_named

    return [pruner_named(one.pruner) for one in sources if isinstance(one, ActiveMasks)]


def observer(method: Any, parameters: Mapping[str, Tensor]) -> Callable[[], Observed]:
    """A function that tells what is to be seen in the step under way, for ``method`` and these parameters.

    Call it where the training loop runs: masks and ``requires_grad`` are read then, and not later.
    """
    if not sources_of(method):
        return lambda: NOTHING_OBSERVED
    pruners = pruners_of(method)

    def observe() -> Observed:
        frozen = frozenset(name for name, parameter in parameters.items() if not parameter.requires_grad)
        return {FROZEN: frozen, **{pruner.name: pruner.snapshot() for pruner in pruners}}

    return observe
