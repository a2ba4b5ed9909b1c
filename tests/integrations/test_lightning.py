"""Lightning's Trainer on two processes of one CPU, where its own hooks are not registered."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.integrations import agree

pytestmark = pytest.mark.timeout(900)

pytest.importorskip("lightning", reason="not installed; pip install 'distcomp[lightning]'")


def module():
    import lightning.pytorch as pl

    class Digits(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(32, 96), nn.Tanh(), nn.Linear(96, 8))

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    return Digits()


def loader():
    x = torch.randn(16 * agree.HALF, 32, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :8].argmax(1)), batch_size=8)


def train(method, steps, save, resume):
    import lightning.pytorch as pl

    from distcomp.integrations.lightning import Compression

    callback = Compression(method) if method else None
    sent = []

    class Count(pl.Callback):
        def on_train_batch_end(self, *_):
            if callback is not None:
                sent.append(callback.handle.stats()["payload_bytes"])

    every = {"dirpath": save, "filename": "last", "every_n_train_steps": steps}
    saver = [pl.callbacks.ModelCheckpoint(**every)] if save is not None else []
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=steps, logger=False,
        enable_checkpointing=save is not None, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Count(), *saver, *([callback] if callback else [])],
    )  # fmt: skip
    model = module()
    trainer.fit(model, loader(), ckpt_path=None if resume is None else resume / "last.ckpt")
    return agree.Trained(agree.flat(model), sent[-1] if sent else 0)


def job(rank, size, directory):
    warnings.simplefilter("ignore")
    agree.local(rank, size)
    return agree.show(train, directory)


def test_lightning(ranks, tmp_path: Path):
    agree.check(ranks(job, tmp_path), least_factor=12)
