"""Which part of a whole tensor lies here: all of it, or the shard of a DTensor.

A piece is a box of the whole tensor: offsets and sizes along each dimension. What one rank's box says about
another rank's is found by coordinates, so that trainer and receiver may be sharded differently, or not
at all.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from distcomp.errors import DistcompError
from distcomp.updates.words import WordType, word_type

if TYPE_CHECKING:  # takes seconds to import, and who has a DTensor has imported it
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

Dimensions = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A box of a tensor called ``name``: ``sizes`` elements from ``offsets`` on, of ``shape`` in all."""

    name: str
    dtype: torch.dtype
    shape: Dimensions
    offsets: Dimensions
    sizes: Dimensions

    @property
    def kind(self) -> WordType:
        """Of its words."""
        return word_type(self.dtype)

    @property
    def halves(self) -> int:
        """Words of an element: two of a complex one."""
        return self.dtype.itemsize // self.kind.itemsize

    @cached_property
    def words(self) -> int:
        """How many words it has."""
        return math.prod(self.sizes) * self.halves

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the tensor."""
        return self.sizes == self.shape

    @cached_property
    def seed(self) -> int:
        """What keys the fingerprint of this tensor's words: its name, dtype and shape."""
        about = f"{self.name}\0{self.dtype}\0{self.shape}".encode(errors="surrogatepass")
        return int.from_bytes(hashlib.blake2b(about, digest_size=8).digest(), "little")

    @property
    def first(self) -> int | None:
        """The index of its first word in the whole tensor, if the others follow it; None if they do not."""
        if not self.words:
            return 0
        leading = next((d for d, size in enumerate(self.sizes) if size > 1), len(self.sizes))
        if self.sizes[leading + 1 :] != self.shape[leading + 1 :]:
            return None
        return self.halves * _flat(self.offsets, self.shape)

    def in_whole(self, places: Tensor) -> Tensor:
        """From indices of words in this box to those in the whole tensor."""
        if self.first is not None:
            return places + self.first
        index = places // self.halves
        whole, stride = torch.zeros_like(places), 1
        for offset, size, length in reversed(list(zip(self.offsets, self.sizes, self.shape, strict=True))):
            whole += (index % size + offset) * stride
            index //= size
            stride *= length
        return whole * self.halves + places % self.halves

    def from_whole(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """From indices in the whole tensor: which of them lie in this box, and where in it these are."""
        if self.is_whole:
            return torch.ones_like(places, dtype=torch.bool), places
        index = places // self.halves
        inside = torch.full_like(places, bool(self.words), dtype=torch.bool)
        here, stride = torch.zeros_like(places), 1
        for offset, size, length in reversed(list(zip(self.offsets, self.sizes, self.shape, strict=True))):
            coordinate = index % length - offset
            inside &= (coordinate >= 0) & (coordinate < size)
            here += coordinate * stride
            index //= length
            stride *= max(size, 1)
        return inside, (here * self.halves + places % self.halves)[inside]


@dataclass(frozen=True)
class LocalPiece:
    """A tensor of a state dict, as far as it lies on this rank."""

    box: Box
    local: Tensor
    mesh: DeviceMesh | None
    """Over which it is sharded; None where it is a plain tensor."""
    speaks: bool
    """Whether this rank counts it, among the ranks that hold the same."""

    @property
    def memory(self) -> tuple[object, ...]:
        """Equal for two names of one piece of memory."""
        where = self.local.untyped_storage().data_ptr(), self.local.storage_offset()
        return (*where, *self.local.shape, *self.local.stride(), self.local.dtype, self.local.device)


def tensors_of(model_or_state: nn.Module | Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict's tensors by name; those of a module share its memory.

    Raises DistcompError for values that are no dense tensors.
    """
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            raise DistcompError(
                f"{name} of the state dict is no dense tensor but {_kind_of(value)}; leave it out, and send "
                "it by other means"
            )
    return dict(state)


def local_pieces(state: Mapping[str, Tensor]) -> list[LocalPiece]:
    """What lies here of each tensor, in order of name. Ranks of one mesh call it alike."""
    pieces = [_local_piece(name, state[name]) for name in sorted(state)]
    meshes = {id(piece.mesh): piece.mesh for piece in pieces if piece.mesh is not None}
    # Plain tensors of a sharded model are alike on its ranks: the first one speaks for them.
    leads = all(_coordinates(mesh) == [0] * mesh.ndim for mesh in meshes.values())
    return [piece if piece.mesh else _spoken(piece, leads) for piece in pieces]


def _spoken(piece: LocalPiece, speaks: bool) -> LocalPiece:
    return LocalPiece(piece.box, piece.local, None, speaks)


def _local_piece(name: str, tensor: Tensor) -> LocalPiece:
    word_type(tensor.dtype)
    shape = tuple(tensor.shape)
    if not hasattr(tensor, "to_local"):
        _check_memory(name, tensor)
        whole = Box(name, tensor.dtype, shape, (0,) * len(shape), shape)
        return LocalPiece(whole, tensor.detach(), None, True)
    sharded = cast("DTensor", tensor.detach())
    if any(placement.is_partial() for placement in sharded.placements):
        raise DistcompError(f"{name} is a partial sum on each rank; redistribute it before it is sent")
    local = sharded.to_local()
    _check_memory(name, local)
    # What torch.distributed.checkpoint asks of a DTensor: where its chunk lies in the whole.
    chunks = sharded.__create_chunk_list__() if local.numel() else []  # type: ignore[no-untyped-call]
    if len(chunks) > 1:
        raise DistcompError(
            f"{name} lies in {len(chunks)} chunks on one rank; redistribute it before it is sent"
        )
    offsets = tuple(chunks[0].offsets) if chunks else (0,) * len(shape)
    mesh = sharded.device_mesh
    coordinates = zip(_coordinates(mesh), sharded.placements, strict=True)
    speaks = all(at == 0 for at, placement in coordinates if placement.is_replicate())
    return LocalPiece(Box(name, local.dtype, shape, offsets, tuple(local.shape)), local, mesh, speaks)


def _check_memory(name: str, local: Tensor) -> None:
    if local.is_conj() or local.is_neg():
        raise DistcompError(
            f"{name} is conjugated or negated lazily, and its memory holds other numbers; give "
            "tensor.resolve_conj().resolve_neg()"
        )


def _coordinates(mesh: DeviceMesh) -> list[int]:
    here = mesh.get_coordinate()
    if here is None:
        raise DistcompError("this rank is none of the mesh's; call it on the mesh's ranks only")
    return list(here)


def _flat(coordinates: Dimensions, shape: Dimensions) -> int:
    index = 0
    for at, length in zip(coordinates, shape, strict=True):
        index = index * length + at
    return index


def _kind_of(value: object) -> str:
    if isinstance(value, Tensor):
        return "one on the meta device" if value.is_meta else f"{value.layout}"
    return f"a {type(value).__name__}"
