"""``torch.set_default_dtype`` changes nothing: every registered method, and every compressor, bit for bit."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from distcomp.averaging.workers import Workers
from distcomp.methods import METHODS, Entry
from distcomp.randomness import Key
from tests.buffers import ORDINARY, draw
from tests.conformance.subjects import Subject, every_compressor
from tests.lockstep import World

OTHERS = (torch.float64, torch.bfloat16)
SIZE, STEPS = 4, 7
EARLY = {"period": 2, "freeze_step": 2, "after": 2, "learn": 5, "compressed": 2, "steps": 2}
"""Settings that bring a method's later phases into a few steps."""
DRAWN = [draw(SIZE, ORDINARY, step) for step in range(STEPS)]
START = draw(1, ORDINARY)[0]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


def made(entry: Entry) -> Any:
    known = inspect.signature(entry.recipe).parameters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that are known to be coarse
        return entry.recipe(**{name: value for name, value in EARLY.items() if name in known})


def gradients(entry: Entry) -> list[Tensor]:
    """The estimates of some steps, and the contributions to the last."""
    world = World(made(entry), SIZE, ORDINARY)
    estimates = []
    for xs in DRAWN:
        results = world.aggregate(xs)
        estimates.append(results[0].estimate)
    return [*estimates, *(result.contribution() for result in results)]


def models(entry: Entry) -> list[Tensor]:
    """The models of all workers after some steps, each of which went its own way in between."""
    workers = Workers(made(entry), START, SIZE, ORDINARY)
    for xs in DRAWN:
        for model, x in zip(workers.models, xs, strict=True):
            model.add_((x - model).mul_(0.125))
        workers.step()
    return list(workers.models)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_method_takes_its_numbers_from_the_default_type(name: str) -> None:
    entry = METHODS[name]
    run = gradients if entry.kind == "gradient" else models
    found = []
    for dtype in (*OTHERS, torch.float32):  # what is remembered of settings is made under another type
        with default_dtype(dtype):
            found.append(run(entry))
    for other in found[:-1]:
        for one, usual in zip(other, found[-1], strict=True):
            assert one.dtype == torch.float32
            assert torch.equal(one, usual)


@pytest.mark.parametrize("subject", every_compressor(), ids=str)
def test_no_compressor_does(subject: Subject) -> None:
    found = []
    for dtype in (*OTHERS, torch.float32):
        with default_dtype(dtype):
            compressor = subject.build()
            payload = compressor.encode(START, ORDINARY, Key.of("dtype"))
            found.append((payload.body.clone(), compressor.decode(payload, ORDINARY)))
    for body, decoded in found[:-1]:
        assert torch.equal(body, found[-1][0])
        assert torch.equal(decoded, found[-1][1])
