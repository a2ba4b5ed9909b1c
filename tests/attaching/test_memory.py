"""What a method is said to keep in memory is what an attached one keeps: all of them, on real processes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import distcomp
from distcomp.advice.memory import bytes_per_parameter, format_size, parse_size, state_bytes
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods import compact_residuals
from distcomp.registry import METHODS, load_all
from tests.attaching.ddp import jobs
from tests.cluster import Cluster

load_all()
AT_ONCE = 6
"""Methods in one job, whose time is bound."""
OF_EXAMPLES = ("codistill",)
"""What it keeps is of shared examples, not of parameters."""
SPECS = [
    *(name for name in METHODS if name not in OF_EXAMPLES),
    "residuals in bf16", "residuals in int8", "warmup:inner=(topk:ratio=0.1),steps=3",
    "two_level:nodes=((0,),(1,)),across=(qsgd:bits=2)", "choco:topology=complete", "ddp", "torch:fp16",
    "torch:powersgd:rank=2", "diloco:on_failure=continue",
]  # fmt: skip


def made(spec: str) -> Any:
    """A method's text, or the method that keeps its residuals in few bits."""
    form = spec.removeprefix("residuals in ")
    return spec if form == spec else compact_residuals("qsgd:bits=1", form)


def kept(rank: int, size: int, specs: list[str]) -> dict[str, int | str]:
    """Of each method after some steps: what ``stats()`` says, or why it is not served."""
    found: dict[str, int | str] = {}
    for spec in specs:
        # PyTorch's PowerSGD sums several buckets in no agreed order, and residuals of 8 bits have a header in
        # each: they get one.
        one = spec in ("torch:powersgd:rank=2", "residuals in int8")
        model: nn.Module = jobs.network()
        if "on_failure" not in spec:  # DDP stops when a rank dies
            model = jobs.wrap(model, bucket_cap_mb=25 if one else 0.004)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                handle = distcomp.attach(model, optimizer, made(spec))
            except DistcompError as error:
                found[spec] = str(error)
                continue
        jobs.train(model, optimizer, rank, steps=3)
        found[spec] = handle.stats()["state_bytes"]
        handle.detach()
    return found


def test_every_method_keeps_what_is_said(cluster: Callable[[int], Cluster]) -> None:
    shapes = [(name, tuple(p.shape)) for name, p in jobs.network().named_parameters()]
    layout = Layout.of(shapes)
    for at in range(0, len(SPECS), AT_ONCE):
        specs = SPECS[at : at + AT_ONCE]
        said = {spec: state_bytes(made(spec), layout, 2) for spec in specs}
        assert cluster(2).run(kept, specs) == [said, said]


def test_figures_per_parameter_are_the_papers() -> None:
    """A residual is one float32; EF21 keeps two tensors; half as much in bfloat16; nothing for bfloat16."""
    expected = {"bf16": 0, "qsgd:bits=1": 4, "residuals in bf16": 2, "ef21": 8, "ddp": 0}
    assert {text: bytes_per_parameter(made(text)) for text in expected} == pytest.approx(expected, abs=1e-3)


def test_sizes_are_read_as_people_write_them() -> None:
    assert [parse_size(text) for text in ("16GB", "16 GiB", "1.5kB", "80gb")] == [
        16 * 10**9, 16 * 2**30, 1500, 80 * 10**9,
    ]  # fmt: skip
    assert [format_size(size) for size in (999, 1.5e9, 0)] == ["999 B", "1.5 GB", "0 B"]
    for wrong in ("16", "GB", "0GB", "-1GB", "16 parsecs"):
        with pytest.raises(DistcompError, match="write it like"):
            parse_size(wrong)


def advised(monkeypatch: pytest.MonkeyPatch, memory_bytes: int) -> Any:
    """Of a matrix of 1000 numbers, when a step takes 100 kB without any method."""
    from distcomp.advice import TrainingTask, advise
    from distcomp.network import Fabric

    monkeypatch.setattr(advise, "peak_bytes", lambda: 100_000)
    batch = (torch.ones(2, 100), torch.ones(2, 10))
    task = TrainingTask(
        nn.Linear(100, 10, bias=False), lambda *_: batch, nn.functional.mse_loss,
        lambda parameters: torch.optim.SGD(parameters, 0.1),
    )  # fmt: skip
    methods = ("ddp", "qsgd:bits=1", "ef21")
    return advise.advise(task, Fabric.uniform(4, "1gbit"), methods, memory_bytes=memory_bytes)


def test_advice_refuses_what_does_not_fit_by_name_and_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    advice = advised(monkeypatch, memory_bytes=107_999)
    assert {row.method for row in advice.rows} == {"ddp", "qsgd:bits=1"}
    (refused,) = advice.refused
    assert refused.sentence == (
        "ef21 does not fit: 100 kB for a step as it is and 8 kB for what the method keeps are 108 kB, and "
        "there are 108 kB"
    )
    assert advice.as_json()["refused"][0]["state_bytes"] == 8000
    assert advised(monkeypatch, memory_bytes=108_000).refused == ()
    with pytest.raises(DistcompError, match="not even plain DDP fits: a step takes 100 kB here"):
        advised(monkeypatch, memory_bytes=99_999)
