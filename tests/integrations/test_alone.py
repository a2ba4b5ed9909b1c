"""A plain ``python train.py``: one process is a world of one, which trains as it would without a callback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distcomp.integrations.alone import Alone

pytestmark = pytest.mark.timeout(900)

TRAINERS = {
    "lightning": """
import lightning.pytorch as pl
from distcomp.integrations.lightning import Compression
from tests.integrations import test_lightning
def train(callbacks):
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_steps=3, logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks)
    model = test_lightning.module()
    trainer.fit(model, test_lightning.loader())
    return model
weights = [p.detach().clone() for p in train([]).parameters()]
compressed = [p.detach() for p in train([Compression("qsgd:bits=4")]).parameters()]
""",
    "transformers": """
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from distcomp.integrations.transformers import Compression
sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2}
texts = torch.randint(64, (64, 16), generator=torch.Generator().manual_seed(0))
data = [{"input_ids": text, "labels": text} for text in texts]
def train(compress):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    trainer = Trainer(model, TrainingArguments(output_dir="unused", use_cpu=True, report_to=[], max_steps=3,
        per_device_train_batch_size=4, save_strategy="no", disable_tqdm=True), train_dataset=data)
    if compress:
        trainer.add_callback(Compression(trainer, "qsgd:bits=4"))
    trainer.train()
    return [p.detach().clone() for p in model.parameters()]
weights = train(False)
compressed = train(True)
""",
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_single_process_trains_and_is_told_that_it_sends_nothing(trainer: str, tmp_path: Path) -> None:
    pytest.importorskip(trainer, reason=f"not installed; pip install 'distcomp[{trainer}]'")
    script = tmp_path / "train.py"
    script.write_text(
        TRAINERS[trainer] + "assert all(a.equal(b) for a, b in zip(weights, compressed, strict=True))\n"
    )
    environment = {"PYTHONPATH": ":".join(filter(None, [*sys.path, str(Path(__file__).parents[2])]))}
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "one process trains alone, so that nothing is sent" in done.stderr


def test_it_says_that_nothing_is_sent_and_kept() -> None:
    stats = Alone().stats()
    assert (stats["payload_bytes"], stats["state_bytes"]) == (0, 0)
