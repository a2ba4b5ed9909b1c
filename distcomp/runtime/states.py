"""A method's state between steps: by parameter, so that buckets may come and go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distcomp.layout import FlatBuffer, Layout
from distcomp.methods.base import (
    ByParameter,
    Method,
    PerParameter,
    State,
    cut_state,
    held_bytes,
    join_state,
    map_state,
)
from distcomp.methods.residuals import PackedBuffer


class States:
    """The state of each flat buffer, cut up and joined anew whenever the flat buffers change."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._by_layout: dict[Layout, State] = {}
        self._loose: dict[str, dict[str, Tensor]] = {}
        """By parameter, of parameters that no present flat buffer holds (loaded, or of flat buffers that are
        gone)."""

    def of(self, layout: Layout, device: torch.device) -> State:
        """The state for a flat buffer."""
        if layout not in self._by_layout:
            # Buckets were cut anew: whatever holds one of these parameters gives its state back first.
            self._retire(set(layout.names))
            fresh = map_state(
                self._method.init(layout),
                lambda _, buffer: FlatBuffer(buffer.data.to(device), buffer.layout),
                lambda _, leaf: PerParameter({name: value.to(device) for name, value in leaf.items()}),
            )
            self._by_layout[layout] = join_state(self._loose, fresh)
            for name in layout.names:
                self._loose.pop(name, None)
        return self._by_layout[layout]

    def commit(self, layout: Layout, state: State) -> None:
        """Keep a flat buffer's new state."""
        self._by_layout[layout] = state

    def by_parameter(self) -> dict[str, dict[str, Tensor]]:
        """Parameter name -> path -> tensor (copies)."""
        everything = {name: dict(leaves) for name, leaves in self._loose.items()}
        for state in self._by_layout.values():
            everything.update(cut_state(state))
        return {
            name: {path: value.detach().clone() for path, value in leaves.items()}
            for name, leaves in everything.items()
            if leaves
        }

    def load(self, cut: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Replace everything; flat buffers take their part when they are next asked for."""
        self._by_layout.clear()
        self._loose = {name: dict(leaves) for name, leaves in cut.items()}

    @property
    def held_bytes(self) -> int:
        """What all of it takes in memory."""
        held = [value for leaves in self._loose.values() for value in leaves.values()]
        loose = sum(value.numel() * value.element_size() for value in held)
        return loose + sum(map(held_bytes, self._by_layout.values()))

    def expected(self, layout: Layout, saved: ByParameter) -> ByParameter:
        """What the state of these parameters has to be like: tensors without values."""
        # Not made on the meta device: what the state depends on, a source's coins, say, needs values.
        expected = self._method.expected_state(layout, saved)
        return {
            name: {path: value.to("meta") for path, value in leaves.items()}
            for name, leaves in expected.items()
        }

    def _retire(self, names: set[str]) -> None:
        for layout in [layout_ for layout_ in self._by_layout if names & set(layout_.names)]:
            self._loose.update(cut_state(self._by_layout.pop(layout)))


def select(finite: Tensor, new: State, old: State) -> State:
    """``new`` where ``finite``, else ``old``: on a GPU without asking the host."""
    if finite.device.type == "cpu":
        return new if finite else old
    old_cut = cut_state(old)

    def pick(name: str, path: str, value: Tensor) -> Tensor:
        return torch.where(finite, value, old_cut[name][path].to(value))

    def buffer(path: str, leaf: FlatBuffer) -> FlatBuffer:
        if isinstance(leaf, PackedBuffer):
            return leaf.where(finite, _leaf(old, path))
        pieces = [pick(param.name, path, piece) for param, piece in leaf.layout.pieces(leaf.data)]
        return FlatBuffer(torch.cat(pieces) if pieces else leaf.data, leaf.layout)

    def each(path: str, leaf: PerParameter) -> PerParameter:
        return PerParameter({name: pick(name, path, value) for name, value in leaf.items()})

    return map_state(new, buffer, each)


def _leaf(state: State, path: str) -> FlatBuffer:
    """The flat buffer at a path such as ``inner/residual``."""
    node: Any = state
    for name in path.split("/"):
        node = node[name]
    assert isinstance(node, FlatBuffer)
    return node
