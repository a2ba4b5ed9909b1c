"""Ray Train on two workers: one of them dies, Ray starts both again, and nobody can tell by the weights."""

import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.integrations import agree

pytestmark = pytest.mark.timeout(900)

pytest.importorskip("ray", reason="not installed; pip install 'distcomp[ray]'")


def train(method, begin, end):
    """Trained, and what it takes to go on."""
    import ray.train.torch

    import distcomp.integrations.ray

    torch.manual_seed(0)
    rank = ray.train.get_context().get_world_rank()
    model = ray.train.torch.prepare_model(nn.Sequential(nn.Linear(32, 96), nn.Tanh(), nn.Linear(96, 8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    handle = distcomp.integrations.ray.attach(model, optimizer, method) if method else None
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as directory:
            saved = torch.load(Path(directory) / "model.pt", weights_only=True)
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    for index in range(begin, end):
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(100 * rank + index))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :8].argmax(1)).backward()
        optimizer.step()
    trained = agree.Trained(agree.flat(model), handle.stats()["payload_bytes"] if handle else 0)
    return trained, {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}, handle


def report(state, handle):
    import ray.train

    from distcomp.integrations import files

    with tempfile.TemporaryDirectory() as directory:
        files.save(handle, directory)
        if ray.train.get_context().get_world_rank() == 0:
            torch.save(state, Path(directory) / "model.pt")
        ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(directory))


def worker(config):
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    shown = Path(config["directory"]) / f"shown{rank}.pt"
    if ray.train.get_checkpoint() is not None:
        resumed, _, _ = train(agree.ONE_BIT, agree.HALF, agree.STEPS)
        before = torch.load(shown, weights_only=True)
        torch.save({**before, "resume is bit-equal": torch.equal(resumed.weights, before["weights"])}, shown)
        return
    alone, carried, fewer = (train(one, 0, agree.STEPS)[0] for one in (None, "ddp", agree.ONE_BIT))
    found = {
        "same training": torch.equal(alone.weights, carried.weights),
        "times fewer bytes": carried.sent_bytes / fewer.sent_bytes,
        "compressed": not torch.equal(alone.weights, fewer.weights),
        "replicas agree": agree.equal_everywhere(fewer.weights),
    }
    torch.save({**found, "weights": fewer.weights}, shown)
    _, state, handle = train(agree.ONE_BIT, 0, agree.HALF)
    report(state, handle)
    if rank == 1:
        raise RuntimeError("this worker dies")


def test_ray(tmp_path: Path, monkeypatch):
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("RAY_worker_niceness", "0")  # the default lets other work go first
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False)
    try:
        TorchTrainer(
            worker,
            train_loop_config={"directory": str(tmp_path)},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(
                storage_path=str(tmp_path / "ray"), failure_config=FailureConfig(max_failures=1)
            ),
        ).fit()
    finally:
        ray.shutdown()
    shown = [torch.load(tmp_path / f"shown{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(shown[0].pop("weights"), shown[1].pop("weights"))
    agree.check(shown, least_factor=12)
