"""A method's state between steps: by parameter, so that buckets may come and go; saved by rank, so that
worlds may."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.layout import FlatBuffer, Layout
from distcomp.methods.base import Method, PerParameter, State, cut_state, join_state, map_state

FORMAT = 1


class States:
    """The state of each flat buffer, cut up and joined anew whenever the flat buffers change."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._slabs: dict[Layout, State] = {}
        self._loose: dict[str, dict[str, Tensor]] = {}
        """By parameter, of parameters that no present flat buffer holds (loaded, or of flat buffers that are
        gone)."""

    def of(self, layout: Layout, device: torch.device) -> State:
        """The state for a flat buffer."""
        if layout not in self._slabs:
            self._retire(set(layout.names))
            fresh = map_state(
                self._method.init(layout),
                lambda _, buffer: FlatBuffer(buffer.data.to(device), buffer.layout),
                lambda _, leaf: PerParameter({name: value.to(device) for name, value in leaf.items()}),
            )
            self._slabs[layout] = join_state(self._loose, fresh)
            for name in layout.names:
                self._loose.pop(name, None)
        return self._slabs[layout]

    def commit(self, layout: Layout, state: State) -> None:
        self._slabs[layout] = state

    def by_parameter(self) -> dict[str, dict[str, Tensor]]:
        """Parameter name -> path -> tensor (copies)."""
        everything = {name: dict(leaves) for name, leaves in self._loose.items()}
        for state in self._slabs.values():
            everything.update(cut_state(state))
        return {
            name: {path: value.detach().clone() for path, value in leaves.items()}
            for name, leaves in everything.items()
            if leaves
        }

    def load(self, cut: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Replace everything; flat buffers take their part when they are next asked for."""
        self._slabs.clear()
        self._loose = {name: dict(leaves) for name, leaves in cut.items()}

    def _retire(self, names: set[str]) -> None:
        for layout in [one for one in self._slabs if names & set(one.names)]:
            self._loose.update(cut_state(self._slabs.pop(layout)))


def select(finite: Tensor, new: State, old: State) -> State:
    """``new`` where ``finite``, else ``old``: on a GPU without asking the host."""
    if finite.device.type == "cpu":
        return new if finite else old
    old_cut = cut_state(old)

    def pick(name: str, path: str, value: Tensor) -> Tensor:
        return torch.where(finite, value, old_cut[name][path].to(value))

    def buffer(path: str, leaf: FlatBuffer) -> FlatBuffer:
        pieces = [pick(param.name, path, piece) for param, piece in leaf.layout.pieces(leaf.data)]
        return FlatBuffer(torch.cat(pieces) if pieces else leaf.data, leaf.layout)

    def each(path: str, leaf: PerParameter) -> PerParameter:
        return PerParameter({name: pick(name, path, value) for name, value in leaf.items()})

    return map_state(new, buffer, each)


def pack(rank: int, size: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint of one rank. Its one key names the rank: savers that merge ranks then lose nothing."""
    return {f"rank{rank}": {"format": FORMAT, "world_size": size, **fields}}


def unpack(saved: Mapping[str, Any] | Sequence[Mapping[str, Any]], rank: int, size: int) -> dict[str, Any]:
    """This rank's part of a checkpoint.

    For the same world size it is what this rank saved. For another, parts of *all* old ranks are needed, and
    every floating tensor becomes their mean: DistributedDataParallel averages, so what n workers owe together
    is the mean of what they owe.

    Raises DistcompError when a rank is missing or the format is unknown.
    """
    parts: dict[str, Any] = {}
    for one in [saved] if isinstance(saved, Mapping) else saved:
        parts.update(one)
    if not parts:
        raise DistcompError(
            "the checkpoint holds no state of any rank; pass what handle.state_dict() returned"
        )
    first = next(iter(parts.values()))
    if not isinstance(first, Mapping) or first.get("format") != FORMAT:
        raise DistcompError(
            "the checkpoint is not distcomp's, or of another format; pass what handle.state_dict() returned"
        )
    old_size = int(first["world_size"])
    if old_size == size and f"rank{rank}" in parts:
        return dict(parts[f"rank{rank}"])
    missing = [old for old in range(old_size) if f"rank{old}" not in parts]
    if missing:
        raise DistcompError(
            f"the checkpoint was saved by {old_size} ranks and this is rank {rank} of {size}; the parts "
            f"of ranks {missing} are missing: pass a list of all ranks' state dicts"
        )
    return {**first, "state": _mean([parts[f"rank{old}"]["state"] for old in range(old_size)])}


def _mean(states: list[Mapping[str, Mapping[str, Tensor]]]) -> dict[str, dict[str, Tensor]]:
    """Floating tensors averaged over ranks; others as rank 0 had them. What some rank lacks is left out."""
    first = states[0]
    return {
        name: {
            path: torch.stack([state[name][path] for state in states]).mean(0)
            if value.is_floating_point()
            else value
            for path, value in leaves.items()
            if all(path in state[name] for state in states)
        }
        for name, leaves in first.items()
    }
