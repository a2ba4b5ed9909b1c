"""A stream of versions: numbered, each chained to the last by its fingerprint, a key frame now and then."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.kernels.words import M64
from distcomp.updates.apply import apply
from distcomp.updates.blocks import entropy_number
from distcomp.updates.encode import ModelOrState, encode, local_fingerprint
from distcomp.updates.fingerprints import state_fingerprint
from distcomp.updates.pieces import local_pieces, tensors_of
from distcomp.updates.update import Update


class MissingUpdate(DistcompError):
    """An update does not follow the version that a receiver has; the message names what is missing."""


@dataclass(frozen=True)
class Publication:
    """A version as it is sent: the difference from the one before, a key frame, or both."""

    difference: Update | None
    key: Update | None

    def __iter__(self) -> Iterator[Update]:
        return (update for update in (self.difference, self.key) if update is not None)


class Publisher:
    """The trainer's side. It keeps a copy of the version that it published last.

    ``state``: version ``number``, which receivers that begin with the same weights need not be sent. A
    trainer that resumes gives the number that it published last: receivers pass over what is older than
    theirs.
    ``key_every``: so many versions apart are key frames (0: none but those that are asked for).
    ``entropy``: as in :func:`encode`.
    """

    def __init__(
        self, state: ModelOrState, *, number: int = 0, key_every: int = 64, entropy: str = "zlib"
    ) -> None:
        entropy_number(entropy)
        self.number = number
        self.key_every = key_every
        self.entropy = entropy
        self._published = {name: tensor.detach().clone() for name, tensor in tensors_of(state).items()}
        self.fingerprint = local_fingerprint(local_pieces(self._published))
        """Of the version published last: what this rank contributes to it."""

    def publish(self, state: ModelOrState, *, key: bool = False, difference: bool = True) -> Publication:
        """The next version. ``key``: with a key frame even if none is due; ``difference=False``: without one.

        Memory: beside the state, the copy kept of the version before and what is sent.

        Raises DistcompError as :func:`encode`; nothing was published then.
        """
        number = self.number + 1
        due = key or not difference or (self.key_every > 0 and number % self.key_every == 0)
        changed = encode(self._published, state, number, entropy=self.entropy, before=self.fingerprint)
        whole = encode(None, state, number, entropy=self.entropy) if due else None
        self._keep(tensors_of(state))
        self.number, self.fingerprint = number, changed.after
        return Publication(changed if difference else None, whole)

    def key_frame(self) -> Update:
        """The version published last, whole, for a receiver that asks."""
        return encode(None, self._published, self.number, entropy=self.entropy)

    @torch.no_grad()
    def _keep(self, state: Mapping[str, Tensor]) -> None:
        for name, kept in self._published.items():
            kept.copy_(state[name])


class Receiver:
    """A receiver's side: the model or state dict that updates are applied to, and which version it is.

    ``number``: of the version that ``state`` is, where the trainer's :class:`Publisher` began with the same
    weights; None where it is nothing yet, and a key frame is waited for.
    """

    def __init__(self, state: ModelOrState, *, number: int | None = 0) -> None:
        self._state = state
        self.number = number
        self.fingerprint = 0 if number is None else state_fingerprint(state)

    @property
    def is_sharded(self) -> bool:
        """Whether the state lies on several ranks, which then apply updates together."""
        meshes = [getattr(tensor, "device_mesh", None) for tensor in tensors_of(self._state).values()]
        return any(mesh is not None and mesh.size() > 1 for mesh in meshes)

    def receive(self, update: Update) -> bool:
        """Apply an update; whether anything was to be done: a repeated or older one changes nothing.

        Raises MissingUpdate naming the versions that are missing, WrongBase, CorruptFile and DistcompError as
        :func:`apply`; the state is what it was then.
        """
        if self.number is not None and update.number <= self.number:
            return False
        if not update.key and (self.number is None or update.number != self.number + 1):
            raise MissingUpdate(f"{self.missing(update.number)}; apply it first, or a key frame")
        self.fingerprint = apply(self._state, update, before=None if update.key else self.fingerprint)
        self.number = update.number
        return True

    def missing(self, number: int) -> str:
        """What lies between the own version and a difference of this number, in words."""
        if self.number is None:
            return f"update {number} is a difference, and there is no version yet that it changes"
        gap = range(self.number + 1, number) or range(number, number + 1)
        which = f"update {gap[0]} is" if len(gap) == 1 else f"updates {gap[0]} to {gap[-1]} are"
        return f"{which} missing between version {self.number}, which is here, and update {number}"

    def check(self) -> None:
        """Read all of the state, and raise DistcompError where somebody else has changed it."""
        found = state_fingerprint(self._state)
        if self.number is not None and found != self.fingerprint:
            raise DistcompError(
                f"the weights have been changed since version {self.number} was applied (fingerprint "
                f"{found:016x}, not {self.fingerprint:016x}); ask for a key frame"
            )

    def forget(self) -> None:
        """Hold the weights for those of no version: the next key frame brings them."""
        self.number, self.fingerprint = None, 0


def total_fingerprint(parts: list[int]) -> int:
    """Of a version whose parts' fingerprints these are."""
    return sum(parts) & M64


def floating_as(state: ModelOrState, dtype: torch.dtype) -> dict[str, Tensor]:
    """A state dict whose floating-point tensors are rounded to ``dtype``: what inference runs of a model that
    is trained in float32. Names that share memory still do."""
    made: dict[tuple[object, ...], Tensor] = {}
    rounded: dict[str, Tensor] = {}
    for name, tensor in tensors_of(state).items():
        # A DTensor's own data_ptr is 0: what lies here is looked at.
        held: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        laid_out = getattr(tensor, "device_mesh", None), getattr(tensor, "placements", None)
        there = held.data_ptr(), held.device, tensor.shape, tensor.stride(), tensor.dtype, *laid_out
        where = there if held.numel() else (name,)
        if where not in made:
            made[where] = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
        rounded[name] = made[where]
    return rounded
