"""What the training loop sees and hands to the methods: masks, and parameters that are not trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from distcomp.active import FROZEN, NOTHING_OBSERVED, OBSERVABLES, ActiveParameters, Observable, Observed
from distcomp.errors import DistcompError

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


def observables_of(method: Any) -> dict[str, Observable]:
    """By name, the live objects that a method, or one within it, depends on.

    Raises DistcompError where one is gone, or lives in another process.
    """
    names = {source.observes for source in sources_of(method) if source.observes}
    known: dict[str, Observable] = {}
    for name in sorted(names):
        live = OBSERVABLES.get(name)
        if live is None:
            raise DistcompError(
                f"a method sends what {name} says, which is not in this process; make both here"
            )
        known[name] = live
    return known


def observer(method: Any, parameters: Mapping[str, Tensor]) -> Callable[[], Observed]:
    """A function that tells what is to be seen in the step under way, for ``method`` and these parameters.

    Call it where the training loop runs: masks and ``requires_grad`` are read then, and not later.
    """
    if not sources_of(method):
        return lambda: NOTHING_OBSERVED
    pruners, observables = pruners_of(method), observables_of(method)

    def observe() -> Observed:
        frozen = frozenset(name for name, parameter in parameters.items() if not parameter.requires_grad)
        seen = {name: live.snapshot() for name, live in observables.items()}
        return {FROZEN: frozen, **seen, **{pruner.name: pruner.snapshot() for pruner in pruners}}

    return observe
