"""TRL's weight sync with our publisher in the place of its client of a vLLM server: TRL's own walk over the
parameters, the model of a sampler updated by what it brings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distcomp import updates
from tests.updates.states import same, stepped
from tests.updates.test_transformers import tiny

generation = pytest.importorskip(
    "trl.generation.vllm_generation", reason="trl is not installed (pip install trl)", exc_type=ImportError
)
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")


class Publishing:
    """What TRL calls with the names and shapes of all parameters, and with an iterator over them."""

    def __init__(self, model: torch.nn.Module, path: Path) -> None:
        self.publisher = updates.Publisher(dict(model.named_parameters()), key_every=0)
        self.directory = updates.UpdateDirectory(path)
        self.resets, self.sent_bytes = 0, 0

    def update_named_params(
        self, metadata: list[tuple[str, str, list[int]]], named_params: Iterator[tuple[str, Tensor]]
    ) -> None:
        pairs = dict(named_params)
        assert [(name, list(one.shape)) for name, one in pairs.items()] == [
            (name, shape) for name, _, shape in metadata
        ]
        publication = self.publisher.publish(pairs)
        self.sent_bytes += publication.difference.nbytes
        self.directory.write(publication)

    def reset_prefix_cache(self) -> None:
        self.resets += 1


def trainers_side(model: torch.nn.Module, client: Publishing) -> object:
    """TRL's object that has the weights synchronized; without the vLLM that it would start or ask."""
    side = object.__new__(generation.VLLMGeneration)
    side.model, side.mode, side.vllm_client = model, "server", client
    side.accelerator = accelerate.Accelerator(cpu=True)
    side._dist = generation.DistributedBackend(side.accelerator)
    side._weight_metadata, side.enable_sleep_mode = None, False
    return side


def test_trls_weight_sync_brings_a_sampler_the_trainers_weights(tmp_path: Path) -> None:
    trainer, sampler = tiny(), tiny()
    client = Publishing(trainer, tmp_path)
    side = trainers_side(trainer, client)
    receiver = updates.Receiver(dict(sampler.named_parameters()))
    for step in range(3):
        for parameter in trainer.parameters():
            parameter.data.copy_(stepped(parameter.data, 0.02, step))
        side.sync_weights()  # type: ignore[attr-defined]
        client.directory.catch_up(receiver)
        assert same(dict(sampler.state_dict()), dict(trainer.state_dict()))
    assert client.resets == receiver.number == 3
    whole_bytes = sum(2 * one.numel() for one in trainer.parameters())
    assert client.sent_bytes < 3 * whole_bytes / 4
