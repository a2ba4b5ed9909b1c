"""torchtitan's own configs and optimizer container, where torchtitan is installed; two shards of FSDP2."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from distcomp.errors import DistcompError
from distcomp.integrations.torchtitan import compressed

STEPS = 3


def needs_torchtitan():
    return pytest.importorskip(
        "torchtitan.components.optimizer", reason="torchtitan is not installed; pip install torchtitan"
    )


@dataclass(kw_only=True)
class TrainerConfig:
    """Of ``Trainer.Config`` the one field that is looked at; the rest wants a GPU to be built."""

    optimizer: object = field()


def sharded() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 96), nn.Tanh(), nn.Linear(96, 8))
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    for block in (model[0], model[2], model):
        fully_shard(block, mesh=mesh)
    return model


def train(rank, method, by_config):
    from torchtitan.components.optimizer import default_adamw

    import distcomp

    model = sharded()
    config = TrainerConfig(optimizer=default_adamw(lr=0.01))
    config.optimizer.implementation = "for-loop"
    if by_config:
        optimizers = compressed(config, method).optimizer.build(model_parts=[model])
        handle = optimizers.distcomp
    else:
        optimizers = config.optimizer.build(model_parts=[model])
        handle = distcomp.attach(model, optimizers.optimizers[0], method)
    for index in range(STEPS):
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(100 * rank + index))
        optimizers.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :8].argmax(1)).backward()
        optimizers.step()
    stats = handle.stats()
    handle.detach()
    weights = torch.cat([value.full_tensor().flatten() for value in model.state_dict().values()])
    return weights, stats["payload_bytes"], stats["method"]


def both(rank, size, method):
    return train(rank, method, by_config=True), train(rank, method, by_config=False)


@pytest.mark.parametrize("method", ["identity", "qsgd:bits=2"])
def test_a_compressed_config_trains_as_the_attached_model_does(cluster, method):
    needs_torchtitan()
    for by_config, by_hand in cluster(2).run(both, method):
        assert torch.equal(by_config[0], by_hand[0])
        assert by_config[1:] == by_hand[1:]
        assert by_config[2] == method


def test_the_method_is_a_field_of_torchtitans_command_line():
    needs_torchtitan()
    import tyro
    from torchtitan.components.optimizer import default_adamw
    from torchtitan.config.manager import custom_registry

    optimizer = compressed(TrainerConfig(optimizer=default_adamw(lr=0.5)), "qsgd:bits=4").optimizer
    read = tyro.cli(type(optimizer), default=optimizer, args=["--method", "bf16"], registry=custom_registry)
    assert read.method == "bf16"
    assert read.param_groups == optimizer.param_groups
    assert optimizer.to_dict()["method"] == "qsgd:bits=4"


@dataclass(kw_only=True, slots=True)
class Container:
    """As torchtitan's of a pipeline: two parts of the model, an optimizer for each."""

    model_parts: list[nn.Module]
    optimizers: list[torch.optim.Optimizer]


@dataclass(kw_only=True, slots=True)
class ContainerConfig:
    lr: float = 0.1

    def build(self, *, model_parts):
        return Container(
            model_parts=model_parts,
            optimizers=[torch.optim.SGD(one.parameters(), self.lr) for one in model_parts],
        )


def test_pipeline_stages_are_refused_before_they_train():
    config = compressed(TrainerConfig(optimizer=ContainerConfig(lr=0.2)), "qsgd:bits=4")
    assert config.optimizer.lr == 0.2
    with pytest.raises(DistcompError, match=r"2 model parts by 2 optimizers.*without pipeline stages"):
        config.optimizer.build(model_parts=[nn.Linear(2, 2), nn.Linear(2, 2)])
