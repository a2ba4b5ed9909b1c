"""Models of transformers: in place, and through load_state_dict."""

from __future__ import annotations

import pytest
import torch

from distcomp import updates
from tests.updates.states import same, stepped

transformers = pytest.importorskip("transformers", reason="pip install 'distcomp[transformers]'")


def tiny():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config).bfloat16()


def test_a_transformers_model_is_updated_in_place_or_by_load_state_dict(tmp_path):
    trainer, in_place, loaded = tiny(), tiny(), tiny()
    publisher = updates.Publisher(trainer, key_every=0)
    held = {
        name: tensor.clone() for name, tensor in loaded.state_dict().items()
    }  # a plain dict, nothing tied
    receivers = [updates.Receiver(in_place), updates.Receiver(held)]
    for step in range(3):
        for parameter in trainer.parameters():
            parameter.data.copy_(stepped(parameter.data, 0.02, step))
        data = publisher.publish(trainer).difference.to_bytes()
        for receiver in receivers:
            receiver.receive(updates.read_update(data))
    loaded.load_state_dict(held)
    wanted = dict(trainer.state_dict())
    assert same(dict(in_place.state_dict()), wanted)
    assert same(dict(loaded.state_dict()), wanted)
    assert in_place.lm_head.weight is in_place.transformer.wte.weight
    names = [piece.box.name for piece in updates.encode(None, trainer).pieces if piece.alias is not None]
    assert names == ["transformer.wte.weight"]  # the embedding is the head: sent once


def test_save_pretrained_reads_what_was_written(tmp_path):
    trainer = tiny()
    trainer.save_pretrained(tmp_path)
    updates.save_safetensors(trainer, tmp_path / "model.safetensors")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert same(dict(again.state_dict()), dict(trainer.state_dict()))
