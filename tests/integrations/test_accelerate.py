"""Accelerate on two processes, with gradients that accumulate."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.integrations import agree

pytestmark = pytest.mark.timeout(900)

pytest.importorskip("accelerate", reason="not installed; pip install 'distcomp[accelerate]'")


def train(method, steps, save, resume):
    from accelerate import Accelerator

    from distcomp.integrations.accelerate import attach

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 96), nn.Tanh(), nn.Linear(96, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    handle = attach(accelerator, model, optimizer, method) if method else None
    begin = 0
    if resume is not None:
        accelerator.load_state(resume)
        begin = agree.HALF
    for index in range(2 * begin, 2 * steps):
        draw = torch.Generator().manual_seed(100 * accelerator.process_index + index)
        x = torch.randn(8, 32, generator=draw)
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(x), x[:, :8].argmax(1)))
            optimizer.step()
            optimizer.zero_grad()
    if save is not None:
        accelerator.save_state(save)
    sent_bytes = 0
    if handle is not None:
        assert handle.stats()["iterations"] == steps
        sent_bytes = handle.stats()["payload_bytes"]
        handle.detach()
    return agree.Trained(agree.flat(model), sent_bytes)


def job(rank, size, directory):
    agree.local(rank, size)
    return agree.show(train, directory)


def test_accelerate(ranks, tmp_path: Path):
    agree.check(ranks(job, tmp_path), least_factor=12)
