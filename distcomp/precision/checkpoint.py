"""Checkpoints of baked models, packed: few distinct numbers need few bits."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distcomp.compressors.fixed import integer_bytes, pack_integers, unpack_integers
from distcomp.errors import DistcompError
from distcomp.parametrize import materialize
from distcomp.precision.convert import remove

WIDEST_CODE = 16
CODES, VALUES, SHAPE = "codes", "values", "shape"


def packed_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` of the baked model without any parametrization, for inference, each tensor as small
    as it can be had exactly.

    A float32 tensor of v distinct numbers is stored as ``name:values`` (the v numbers), ``name:codes``
    (``ceil(log2 v)`` bits per element) and ``name:shape``, where that is smaller; any other tensor as it is.
    Bit for bit the same after :func:`unpacked_state_dict`. Nothing but tensors: save it with ``torch.save``
    and load it with ``weights_only=True``. The model stays as it is.
    """
    packed: dict[str, Tensor] = {}
    for name, tensor in materialize(remove(copy.deepcopy(model), densify=True)).state_dict().items():
        packed |= _packed(name, tensor.detach())
    return packed


def unpacked_state_dict(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a plain model loads: the inverse of :func:`packed_state_dict`.

    Raises DistcompError where a part of a tensor is missing or has another length than its shape needs.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in packed.items():
        whole, _, part = name.rpartition(":")
        if not whole:
            state[name] = tensor
        elif part == CODES:
            state[whole] = _unpacked(whole, packed)
    return state


def _packed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if tensor.dtype != torch.float32 or not tensor.numel():
        return {name: tensor.clone()}
    values, codes = torch.unique(tensor.contiguous().view(torch.int32).flatten(), return_inverse=True)
    bits = _bits(values.numel())
    small = integer_bytes(codes.numel(), bits) + values.nbytes + 8 * tensor.dim()
    if bits > WIDEST_CODE or small >= tensor.nbytes:
        return {name: tensor.clone()}
    return {
        f"{name}:{CODES}": pack_integers(codes, bits),
        f"{name}:{VALUES}": values.view(torch.float32),
        f"{name}:{SHAPE}": torch.tensor(tensor.shape, dtype=torch.int64),
    }


def _bits(count: int) -> int:
    return max(1, (count - 1).bit_length())


def _unpacked(name: str, packed: Mapping[str, Tensor]) -> Tensor:
    try:
        codes, values, shape = (packed[f"{name}:{part}"] for part in (CODES, VALUES, SHAPE))
    except KeyError as missing:
        raise DistcompError(f"the checkpoint lacks {missing}; save it again") from None
    numel, bits = math.prod(shape.tolist()), _bits(values.numel())
    if not values.numel() or codes.numel() != integer_bytes(numel, bits):
        raise DistcompError(f"{name} is not whole in this checkpoint; save it again with packed_state_dict()")
    indices = unpack_integers(codes, numel, bits)
    if numel and int(indices.max()) >= values.numel():
        raise DistcompError(f"{name} has a code without a value; the checkpoint is damaged, save it again")
    return values[indices].view(tuple(shape.tolist()))
