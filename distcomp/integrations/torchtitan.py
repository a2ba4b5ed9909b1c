"""torchtitan: a config function of its registries becomes one whose trainer compresses.

Nothing of torchtitan is imported: its configs are dataclasses that build what they describe.
"""

from __future__ import annotations

from dataclasses import fields, make_dataclass, replace
from typing import Any, Protocol, TypeVar

from distcomp.attaching.handle import attach
from distcomp.errors import DistcompError


class HasOptimizer(Protocol):
    """A ``Trainer.Config`` of torchtitan's, as far as it is looked at."""

    optimizer: Any


Config = TypeVar("Config", bound=HasOptimizer)


def compressed(config: Config, method: str) -> Config:
    """The config, whose optimizer attaches ``method`` to the FSDP2 model that it is built for.

    In a registry of config functions::

        def llama3_8b_4bit():
            return compressed(llama3_8b(), "qsgd:bits=4")

    The text is a field of the config: ``--optimizer.method qsgd:bits=2`` on torchtitan's command line. The
    handle is ``trainer.optimizers.distcomp``. torchtitan's checkpoints do not hold what the method remembers.

    Raises:
        DistcompError: when the trainer is built, where its optimizer is not one optimizer of one model part
            (pipelines, Muon beside AdamW).
    """
    plain = type(config.optimizer)

    def build(self: Any, **runtime: Any) -> Any:
        container = plain.build(self, **runtime)
        parts, optimizers = list(container.model_parts), list(container.optimizers)
        if len(parts) != 1 or len(optimizers) != 1:
            raise DistcompError(
                f"torchtitan steps {len(parts)} model parts by {len(optimizers)} optimizers, and a method "
                "goes with one of each; train without pipeline stages, with one optimizer"
            )
        container.distcomp = attach(parts[0], optimizers[0], self.method)
        return container

    kind = make_dataclass(
        f"Compressed{plain.__name__}", [("method", str)], bases=(plain,), namespace={"build": build},
        kw_only=True, slots=True,
    )  # fmt: skip
    told = {one.name: getattr(config.optimizer, one.name) for one in fields(plain)}
    return replace(config, optimizer=kind(**told, method=method))  # type: ignore[type-var]  # a dataclass
