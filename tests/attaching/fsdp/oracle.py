"""What FSDP2 with compressed gradients computes, in one process and NumPy, from its description alone.

Each of the n ranks computes the gradient of its own batch. A module's parameters are padded in their first
dimension to a multiple of the shards, cut in as many pieces, and laid out piece by piece. One bit: the sign
times the mean magnitude of each 512 elements of a piece, with error feedback.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from tests.attaching.fsdp.shard_jobs import LR, MOMENTUM, batch

Array = np.ndarray
BLOCK = 512


def units(model: nn.Sequential) -> list[list[str]]:
    """The buffers' parameters, by name: each Linear's, and the root's rest."""
    names = dict(model.named_parameters())
    linear = [
        [f"{i}.{name}" for name, _ in part.named_parameters()]
        for i, part in enumerate(model)
        if isinstance(part, nn.Linear)
    ]
    return [*linear, [name for name in names if not any(name in unit for unit in linear)]]


def interleave(parameters: list[Array], shards: int) -> Array:
    """``[shards, piece]``: the buffer that FSDP reduces."""
    rows = []
    for one in parameters:
        missing = -one.shape[0] % shards
        padded = np.concatenate([one, np.zeros((missing, *one.shape[1:]), one.dtype)])
        rows.append(padded.reshape(shards, -1))
    return np.concatenate(rows, axis=1)


def part(buffer: Array, shapes: list[tuple[int, ...]]) -> list[Array]:
    """The parameters of a buffer again."""
    found, at, shards = [], 0, buffer.shape[0]
    for shape in shapes:
        rows = -(-shape[0] // shards) * shards
        width = rows // shards * int(np.prod(shape[1:], dtype=int))
        whole = buffer[:, at : at + width].reshape(rows, *shape[1:])
        found.append(whole[: shape[0]])
        at += width
    return found


def one_bit(x: Array) -> Array:
    """Sign times mean magnitude, block by block of a row; the sign of zero is plus."""
    out = np.empty_like(x)
    for row, target in zip(x, out, strict=True):
        for at in range(0, len(row), BLOCK):
            block = row[at : at + BLOCK]
            scale = np.float32(np.abs(block).astype(np.float64).mean())
            target[at : at + BLOCK] = np.where(block >= 0, scale, -scale)
    return out


def exact(x: Array) -> Array:
    return x


def train(
    make: Callable[[], nn.Sequential],
    steps: int,
    shards: int,
    replicas: int,
    code: Callable[[Array], Array],
) -> Array:
    """All weights after some steps of SGD with momentum. ``code``: compresses ``[rows, elements]``."""
    model = make()
    named = dict(model.named_parameters())
    kept = units(model)
    velocity = {name: np.zeros(tuple(p.shape), np.float32) for name, p in named.items()}
    debts: dict[tuple[int, int], Array] = {}
    for step in range(steps):
        gradients = []
        for rank in range(shards * replicas):
            x, y = batch(rank, step)
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            gradients.append({name: p.grad.numpy().copy() for name, p in named.items() if p.grad is not None})
        for number, names in enumerate(kept):
            buffers = [interleave([g[name] for name in names], shards) for g in gradients]
            mean = _reduced(buffers, number, debts, shards, replicas, code)
            pieces = part(mean, [tuple(named[name].shape) for name in names])
            for name, gradient in zip(names, pieces, strict=True):
                velocity[name] = MOMENTUM * velocity[name] + gradient
                with torch.no_grad():
                    named[name] -= LR * torch.from_numpy(velocity[name].astype(np.float32))
    return np.concatenate([p.detach().numpy().reshape(-1) for p in named.values()])


def _reduced(
    buffers: list[Array],
    number: int,
    debts: dict[tuple[int, int], Array],
    shards: int,
    replicas: int,
    code: Callable[[Array], Array],
) -> Array:
    """Over all ranks at once; with replicas, exactly inside each and compressed across them."""
    speakers = buffers
    if replicas > 1:
        speakers = [
            np.mean(buffers[r * shards : (r + 1) * shards], axis=0, dtype=np.float32) for r in range(replicas)
        ]
    total = np.zeros_like(speakers[0])
    for speaker, buffer in enumerate(speakers):
        residual = buffer + debts.get((number, speaker), np.float32(0))
        sent = code(residual)
        debts[number, speaker] = residual - sent
        total += sent
    return total / np.float32(len(speakers))
