"""Who is learnt from: a network, several, or logits that were computed once.

A teacher is frozen, in evaluation, and a part of nothing: no optimizer, no bucket, no average and no
checkpoint of the student knows it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distcomp.distill.cache import LogitCache, digest_of
from distcomp.distill.taps import Taps
from distcomp.errors import DistcompError

Batch = Tensor | tuple[Any, ...]
"""A model's input, or several."""


@dataclass(frozen=True)
class NetworkOutput:
    """What a forward gave. ``members``: the logits of each of several teachers, with their ``shares``."""

    logits: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)
    members: tuple[Tensor, ...] = ()
    shares: tuple[float, ...] = ()

    @property
    def each(self) -> tuple[tuple[Tensor, ...], tuple[float, ...]]:
        """The members and their shares; of one network, itself."""
        return (self.members, self.shares) if self.members else ((self.logits,), (1.0,))


class Teacher(ABC):
    """Says what it predicts of a batch."""

    @abstractmethod
    def tap(self, names: Iterable[str]) -> None:
        """Keep what these modules give from now on. Raises DistcompError where there are none."""

    @abstractmethod
    def predict(self, batch: Batch, keys: Sequence[int] | None) -> NetworkOutput:
        """What it predicts, without a gradient. ``keys`` name the examples, where logits are kept."""

    def modules(self) -> tuple[nn.Module, ...]:
        """The networks it consists of."""
        return ()

    def remove(self) -> None:  # noqa: B027  (most have nothing to take off)
        """Take the taps off."""


class NetworkTeacher(Teacher):
    """A network. It is frozen and put into evaluation, and stays so."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)
        self._taps = Taps(network, ())

    def tap(self, names: Iterable[str]) -> None:
        self._taps.remove()
        self._taps = Taps(self.network, names)

    @torch.no_grad()
    def predict(self, batch: Batch, keys: Sequence[int] | None = None) -> NetworkOutput:
        self.network.eval()  # somebody may have put it into training together with other modules
        logits = logits_of(called(self.network, batch))
        return NetworkOutput(logits, self._taps.taken())

    def modules(self) -> tuple[nn.Module, ...]:
        return (self.network,)

    def remove(self) -> None:
        self._taps.remove()


class SeveralTeachers(Teacher):
    """Several networks, each with a share of what is said; equal shares where none are given.

    Their logits are ``sum_k w_k z_k``; Hinton's loss may mix their probabilities instead. Features are those
    of the first one.

    Raises DistcompError for no teacher, or shares that are not one positive number each.
    """

    def __init__(self, networks: Sequence[nn.Module], shares: Sequence[float] | None = None) -> None:
        given = tuple(shares) if shares is not None else (1.0,) * len(networks)
        if not networks or len(given) != len(networks) or min(given, default=0) <= 0:
            raise DistcompError(
                f"{len(networks)} teachers with the shares {given}; give one teacher or more, and to each a "
                "share above 0"
            )
        self._teachers = [NetworkTeacher(network) for network in networks]
        self._shares = tuple(share / sum(given) for share in given)

    def tap(self, names: Iterable[str]) -> None:
        self._teachers[0].tap(names)

    def predict(self, batch: Batch, keys: Sequence[int] | None = None) -> NetworkOutput:
        said = [teacher.predict(batch) for teacher in self._teachers]
        members = tuple(one.logits for one in said)
        logits = torch.stack([w * z for w, z in zip(self._shares, members, strict=True)]).sum(0)
        return NetworkOutput(logits, said[0].features, members, self._shares)

    def modules(self) -> tuple[nn.Module, ...]:
        return tuple(teacher.network for teacher in self._teachers)

    def remove(self) -> None:
        for teacher in self._teachers:
            teacher.remove()


class CachedTeacher(Teacher):
    """A network whose logits are computed once for each example and kept in a directory.

    ``keys`` name the examples: ``teach(batch, labels, keys)``. Without augmentation only: an example has one
    row of logits. With ``network=None`` all must be there already (``teacher`` names whose they are).

    Raises DistcompError for taps (features are not kept), missing keys, and what LogitCache refuses.
    """

    def __init__(self, network: nn.Module | None, directory: str | Path, teacher: str | None = None) -> None:
        if network is None and teacher is None:
            raise DistcompError(
                "a cache without a network does not say whose logits it holds; give the teacher's digest: "
                "CachedTeacher(None, directory, teacher=distcomp.distill.digest_of(network))"
            )
        self._inner = NetworkTeacher(network) if network is not None else None
        named = teacher if network is None else digest_of(network)
        self.cache = LogitCache(directory, named, alone=network is not None)  # type: ignore[arg-type]

    def tap(self, names: Iterable[str]) -> None:
        name = next(iter(names), None)
        if name is not None:
            raise DistcompError(
                f"cached logits have no features, and the loss asks for the teacher's module {name!r}; give "
                "the network itself"
            )

    def predict(self, batch: Batch, keys: Sequence[int] | None = None) -> NetworkOutput:
        rows, device = _rows(batch)
        if keys is None or len(keys) != rows:
            raise DistcompError(
                f"cached logits are kept by example, and {rows} rows came with "
                f"{'no' if keys is None else len(keys)} keys; call teach(batch, labels, keys) with one whole "
                "number for each row"
            )
        numbers = [int(key) for key in keys]
        missing = self.cache.missing(numbers)
        if missing:
            if self._inner is None:
                raise DistcompError(
                    f"example {numbers[missing[0]]} has no cached logits in {self.cache.directory}, and "
                    "there is no network to compute them; give it, or fill the cache first"
                )
            # The whole batch, not the missing rows alone: a row's bits may depend on how many come with it.
            computed = self._inner.predict(batch).logits
            self.cache.put([numbers[at] for at in missing], computed[missing])
        return NetworkOutput(self.cache.get(numbers).to(device))

    def modules(self) -> tuple[nn.Module, ...]:
        return self._inner.modules() if self._inner is not None else ()


class KnownLogits(Teacher):
    """Logits of some examples, ``[examples, ..., classes]``, which somebody has computed; ``keys`` are places
    in them: ``teach(batch, keys=rows)``. So one network is distilled from what codistilled workers predict
    together, ``handle.exchange(model(shared).detach())``.

    Raises DistcompError for taps, and for keys that are missing or no places.
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits.detach()

    def tap(self, names: Iterable[str]) -> None:
        name = next(iter(names), None)
        if name is not None:
            raise DistcompError(f"known logits have no features, and the loss asks for the module {name!r}")

    def predict(self, batch: Batch, keys: Sequence[int] | None = None) -> NetworkOutput:
        rows, device = _rows(batch)
        places = torch.as_tensor(keys if keys is not None else [], dtype=torch.int64)
        if len(places) != rows or not bool(((places >= 0) & (places < len(self.logits))).all()):
            raise DistcompError(
                f"{rows} rows came with {len(places)} keys, and known logits take one place below "
                f"{len(self.logits)} for each; call teach(batch, keys=places)"
            )
        return NetworkOutput(self.logits[places.to(self.logits.device)].to(device))


def called(model: nn.Module, batch: Batch) -> Any:
    """The model of a batch, or of several inputs."""
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def logits_of(output: Any) -> Tensor:
    """The logits of what a network gave: a tensor, or what has them as ``logits``.

    Raises DistcompError for anything else.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise DistcompError(
            f"the network gives a {type(output).__name__}, and a tensor of logits, or something with "
            "'logits', is needed; wrap it in a module that returns them"
        )
    return logits


def teacher_of(given: Teacher | nn.Module | Sequence[nn.Module]) -> Teacher:
    """A teacher: one of this room, a network, or a list of networks.

    Raises DistcompError for anything else.
    """
    if isinstance(given, Teacher):
        return given
    if isinstance(given, nn.Module) and not isinstance(given, nn.ModuleList):
        return NetworkTeacher(given)
    if isinstance(given, list | tuple | nn.ModuleList):
        return SeveralTeachers(list(given))
    raise DistcompError(f"the teacher is a {type(given).__name__}; give a torch.nn.Module, or a list of them")


def _rows(batch: Batch) -> tuple[int, torch.device]:
    first = batch[0] if isinstance(batch, tuple) else batch
    return len(first), first.device
