"""What modules inside a network gave in its last forward, by the modules' names.

Names are those of the plain network, whatever is wrapped around it: DistributedDataParallel, FSDP2,
``torch.compile``. A tap that did not run is an error that names it, never a missing term of the loss.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from distcomp.errors import DistcompError
from distcomp.private_torch import version_of
from distcomp.pruning.masks import unwrapped
from distcomp.training import uncompiled


class Taps:
    """Keeps the outputs of the modules ``names`` of ``model``, or what ``heads`` make of them.

    A head, a regressor or a translator, runs inside the model's forward, on the module of its name: it must
    be a submodule of the model by then, so that whoever reduces the model's gradients reduces the head's
    (:func:`install_heads`). :meth:`remove` ends it.

    Raises DistcompError for a name that the model does not have.
    """

    def __init__(
        self, model: nn.Module, names: Iterable[str], heads: Mapping[str, nn.Module] | None = None
    ) -> None:
        self._model = unwrapped(model)
        self._names = tuple(dict.fromkeys(names))
        self._heads = dict(heads or {})
        self._outputs: dict[str, tuple[Tensor, int]] = {}
        modules = {name: named_module(self._model, name) for name in self._names}
        self._hooks = [
            module.register_forward_hook(_OwnTap(name, uncompiled(self.keep)))
            for name, module in modules.items()
        ]

    def keep(self, name: str, output: Any) -> None:
        """Called when the module has run."""
        if not isinstance(output, Tensor):
            raise DistcompError(
                f"the module {name!r} gives a {type(output).__name__}, and a tap keeps a tensor; name a "
                "module inside it that gives one"
            )
        head = self._heads.get(name)
        kept = output if head is None else head(output)
        self._outputs[name] = (kept, version_of(kept))

    def taken(self) -> dict[str, Tensor]:
        """The outputs of the last forward; they are then forgotten, so that none is taken twice.

        Raises DistcompError naming a module that did not run, whose hook was left out by a compiled forward,
        or whose output was changed in place afterwards (``nn.ReLU(inplace=True)``).
        """
        missing = [name for name in self._names if name not in self._outputs]
        outputs, self._outputs = self._outputs, {}
        if missing:
            raise DistcompError(
                f"the module {missing[0]!r} gave nothing in the last forward: it did not run, or "
                "torch.compile compiled that forward before the tap was there; make the Distill before the "
                "first forward, or name a module that runs"
            )
        for name, (output, version) in outputs.items():
            if version_of(output) != version:
                raise DistcompError(
                    f"what the module {name!r} gave was changed in place by what follows it; tap that "
                    "module, or make it inplace=False"
                )
        return {name: output for name, (output, _) in outputs.items()}

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class _OwnTap:
    """A hook of this model alone: a copy of the model, or one that is saved and loaded, has an empty one."""

    def __init__(self, name: str, keep: Callable[[str, Any], None] | None = None) -> None:
        self._name = name
        self._keep = keep

    def __call__(self, module: nn.Module, inputs: object, output: Any) -> None:
        if self._keep is not None:
            self._keep(self._name, output)

    def __deepcopy__(self, memo: object) -> _OwnTap:
        return _OwnTap(self._name)

    def __reduce__(self) -> tuple[type[_OwnTap], tuple[str]]:
        return _OwnTap, (self._name,)


def named_module(model: nn.Module, name: str) -> nn.Module:
    """The module of a name. Raises DistcompError, with the nearest name, for one that is not there."""
    known = dict(model.named_modules())
    if name and name in known:
        module: nn.Module = known[name]
        return module
    close = difflib.get_close_matches(name, [other for other in known if other], n=1, cutoff=0.0)
    nearest = f"; did you mean {close[0]!r}?" if close else ""
    raise DistcompError(f"{type(model).__name__} has no module {name!r} to tap{nearest}")


HEADS = "distill_heads"
"""The submodule of the student that holds what is trained with it and dropped afterwards."""


class Heads(nn.ModuleDict):
    """What is trained beside a student. A Sequential calls it as its last module: it changes nothing."""

    def forward(self, x: Any) -> Any:
        return x


def install_heads(student: nn.Module, heads: Mapping[str, nn.Module]) -> None:
    """Make ``heads`` a part of the student, so that they are optimized, reduced and saved with it.

    Do it before DistributedDataParallel, ``fully_shard`` and the optimizer see the student. Raises
    DistcompError where the student is wrapped already and does not have them, or has others.
    """
    inner = unwrapped(student)
    if not heads:
        return
    installed = getattr(inner, HEADS, None)
    if installed is None:
        if inner is not student or is_sharded_student(student):
            raise DistcompError(
                "the loss trains heads beside the student, and the student is wrapped already, so that "
                "nobody would reduce their gradients; call distcomp.distill.install_heads(student, "
                "loss.heads()) before DistributedDataParallel, fully_shard or torch.compile"
            )
        installed = Heads()
        inner.add_module(HEADS, installed)
    for name, head in heads.items():
        key = name.replace(".", "/")
        if key in installed and installed[key] is not head:
            raise DistcompError(
                f"the student has another head on {name!r} already; take it off first: "
                "distcomp.distill.remove_heads(student)"
            )
        if key not in installed:
            installed[key] = head


def remove_heads(student: nn.Module) -> None:
    """Take off what :func:`install_heads` put there: the student is the plain network again."""
    inner = unwrapped(student)
    if hasattr(inner, HEADS):
        delattr(inner, HEADS)


def is_sharded_student(student: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on it: its class then has FSDP2's public methods."""
    return hasattr(unwrapped(student), "set_requires_gradient_sync")
