"""Which parameters did this rank's backward not reach? Told by public hooks, judged as DDP itself does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from distcomp.layout import Layout


class UnusedParameters:
    """Keeps which parameters a backward has reached since they were last asked about.

    A bucket of DDP holds zeros, or a stale ``.grad``, where a parameter was not used, and does not say so.
    Nor can zeros be told from a gradient that is zero. So we hook what DDP hooks, the node that accumulates
    each parameter's gradient, and judge as it does: used is what has a gradient after that node has run, also
    in a backward under ``no_sync()``. A bucket comes when all its parameters have been reached or are known
    to be out of the graph; what was not reached by then is unused.

    ``parameters``: by name, those that DDP reduces.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._used: set[str] = set()
        trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        # The node is held here, too: torch makes a new one, without our hook, when nobody holds it.
        self._nodes = {name: get_gradient_edge(parameter).node for name, parameter in trained.items()}
        self._hooks = [
            node.register_prehook(self._recorder(name, trained[name])) for name, node in self._nodes.items()
        ]

    def _recorder(self, name: str, parameter: Tensor) -> Any:
        def record(gradients: tuple[Tensor | None, ...]) -> None:
            if gradients[0] is not None or parameter.grad is not None:
                self._used.add(name)

        return record

    def take(self, layout: Layout) -> frozenset[str]:
        """The parameters of a bucket that were not reached. Forgets about the others of it."""
        names = frozenset(layout.names)
        unused = names - self._used
        self._used -= names
        return unused

    def close(self) -> None:
        """Leave the model."""
        for hook in self._hooks:
            hook.remove()
        self._nodes.clear()
