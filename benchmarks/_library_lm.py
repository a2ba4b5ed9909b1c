"""A byte-level language model on Python's whole standard library, for many workers at once.

The text: every module of the library but tests and tables, each once, in order of path; every tenth is kept
for the test. Workers read files dealt out in turn, or each packages of its own. The model is a transformer
without biases and with norms that learn nothing, as OLMo's and nanoGPT's speed runs have: all of it is
matrices, and no row is held back by the few numbers that methods leave in float32.

Workers' models are the rows of one tensor, and their forward is one: a batched product where one model has
a product (:func:`stacked`). Batch *t* of a seed is drawn from ``(seed, t)`` alone.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, gelu, layer_norm, scaled_dot_product_attention

from benchmarks._crowd import Batch, Task
from distcomp.layout import Layout

BYTES, CONTEXT, WIDTH, HEADS, LAYERS = 256, 64, 48, 2, 2
TEST_TEXTS = 1024
LEFT_OUT = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__",
}  # fmt: skip
"""Folders: what others installed, tests, and tables that are no language."""


class Block(nn.Module):
    """Attention to what came before, then a layer at each place; each adds to what it read."""

    def __init__(self) -> None:
        super().__init__()
        self.queries_keys_values = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.mixed = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixed(_attended(self.queries_keys_values(_normed(x))))
        return x + self.down(gelu(self.up(_normed(x))))


class Reader(nn.Module):
    """Scores of the next byte, ``[texts, places, 256]``, of ``text``, ``[texts, places]``."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(BYTES, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.out = nn.Linear(WIDTH, BYTES, bias=False)
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.08)

    def forward(self, text: Tensor) -> Tensor:
        x = self.bytes(text) + self.places.weight
        for block in self.blocks:
            x = block(x)
        return self.out(_normed(x))


def stacked(models: Tensor, layout: Layout, texts: Tensor) -> Tensor:
    """As :class:`Reader`, of every worker: ``models`` ``[workers, layout.numel]``, ``texts`` ``[workers,
    texts, places]``; scores ``[workers, texts, places, 256]``."""
    workers, count, places = texts.shape
    pieces = torch.split(models, layout.sizes, 1)
    weights = {
        param.name: piece.view(workers, *param.shape)
        for param, piece in zip(layout.slices, pieces, strict=True)
    }

    def linear(x: Tensor, name: str) -> Tensor:
        return torch.bmm(x, weights[f"{name}.weight"].mT)

    # Row b of worker w's table is row 256 w + b of all tables one under the other.
    own = texts + BYTES * torch.arange(workers)[:, None, None]
    x = embedding(own, weights["bytes.weight"].reshape(-1, WIDTH)) + weights["places.weight"][:, None]
    x = x.view(workers, count * places, WIDTH)
    for number in range(LAYERS):
        at = f"blocks.{number}"
        heads = linear(_normed(x), f"{at}.queries_keys_values").view(workers * count, places, 3 * WIDTH)
        x = x + linear(_attended(heads).view(x.shape), f"{at}.mixed")
        x = x + linear(gelu(linear(_normed(x), f"{at}.up")), f"{at}.down")
    return linear(_normed(x), "out").view(workers, count, places, BYTES)


def _normed(x: Tensor) -> Tensor:
    return layer_norm(x, (WIDTH,))


def _attended(queries_keys_values: Tensor) -> Tensor:
    """What each place takes from those before it: ``[texts, places, 3 width]`` to ``[texts, places,
    width]``."""
    count, places, _ = queries_keys_values.shape
    heads = queries_keys_values.view(count, places, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
    queries, keys, values = heads.unbind()
    attended = scaled_dot_product_attention(queries, keys, values, is_causal=True)
    return attended.transpose(1, 2).reshape(count, places, WIDTH)


def loss_of(scores: Tensor, following: Tensor) -> Tensor:
    """Nats per byte."""
    return cross_entropy(scores.flatten(0, -2), following.flatten())


@cache
def library() -> tuple[Tensor, ...]:
    """The bytes of every module of the standard library (uint8), in order of path, equal ones once."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[bytes, Tensor] = {}
    for path in sorted(root.rglob("*.py")):
        text = path.read_bytes()
        if LEFT_OUT.isdisjoint(path.relative_to(root).parts) and len(text) > CONTEXT:
            told = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            found.setdefault(hashlib.sha256(text).digest(), told)
    return tuple(found.values())


def fingerprint() -> str:
    """Of the text, which changes with Python's version."""
    whole = hashlib.sha256()
    for module in library():
        whole.update(module.numpy().tobytes())
    return whole.hexdigest()[:16]


def dealt(modules: Sequence[Tensor], workers: int) -> list[Tensor]:
    """Every worker's text: files dealt out in turn, so that all read of everything."""
    return [torch.cat(list(modules[worker::workers])) for worker in range(workers)]


def apart(modules: Sequence[Tensor], workers: int) -> list[Tensor]:
    """Every worker's text: neighbouring files, as many bytes for each, so that packages stay together."""
    return list(torch.cat(list(modules)).tensor_split(workers))


@dataclass
class Draws:
    """Batch after batch: ``batch`` random texts of each worker, drawn from the seed and the step alone."""

    texts: list[Tensor]
    batch: int
    seed: int
    step: int = 0

    def __post_init__(self) -> None:
        self._lengths = torch.tensor([len(text) for text in self.texts])[:, None]
        self._begins = self._lengths.cumsum(0) - self._lengths
        self._together = torch.cat(self.texts)

    def __iter__(self) -> Draws:
        return self

    def __next__(self) -> Batch:
        draw = torch.Generator().manual_seed(1_000_000 * self.seed + self.step)
        self.step += 1
        shares = torch.rand(len(self.texts), self.batch, dtype=torch.float64, generator=draw)
        starts = self._begins + (shares * (self._lengths - CONTEXT)).long()
        windows = self._together[starts[..., None] + torch.arange(CONTEXT + 1)].long()
        return windows[..., :-1], windows[..., 1:]


def library_model(batch: int, heterogeneous: bool = False) -> Task:
    """Workers read ``batch`` texts of 64 bytes in each step."""
    modules = list(library())
    held_out = torch.cat(modules[::10])
    del modules[::10]
    cut = apart if heterogeneous else dealt

    def batches(workers: int, seed: int) -> Draws:
        return Draws(cut(modules, workers), batch, seed)

    inputs, targets = next(Draws([held_out], TEST_TEXTS, seed=0))
    return Task(Reader, loss_of, batches, (inputs[0], targets[0]), stacked)
