"""Transformers' Trainer on two processes: a small GPT-2 whose embedding and head are one tensor."""

import warnings
from pathlib import Path

import pytest
import torch

from tests.integrations import agree

pytestmark = pytest.mark.timeout(900)

pytest.importorskip("transformers", reason="not installed; pip install 'distcomp[transformers]'")


def train(method, steps, save, resume):
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    from distcomp.integrations.transformers import Compression

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    texts = torch.randint(64, (64, 16), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        output_dir=str(save or resume or "unused"), use_cpu=True, ddp_backend="gloo", report_to=[],
        per_device_train_batch_size=4, max_steps=steps, lr_scheduler_type="constant", disable_tqdm=True,
        save_strategy="steps" if save is not None else "no", save_steps=steps,
    )  # fmt: skip
    data = [{"input_ids": text, "labels": text} for text in texts]
    trainer = Trainer(model, arguments, train_dataset=data)
    callback = Compression(trainer, method) if method else None
    if callback is not None:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume / f"checkpoint-{agree.HALF}"))
    sent_bytes = callback.handle.stats()["payload_bytes"] if callback is not None else 0
    return agree.Trained(agree.flat(model), sent_bytes)


def job(rank, size, directory):
    warnings.simplefilter("ignore")
    agree.local(rank, size)
    return agree.show(train, directory)


def test_transformers(ranks, tmp_path: Path):
    agree.check(ranks(job, tmp_path), least_factor=12)
