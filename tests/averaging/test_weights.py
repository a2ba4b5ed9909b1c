"""What averaging takes of a module: what is trained, what has changed since, and what it refuses by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from distcomp.attaching.weights import Weights
from distcomp.errors import DistcompError


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    return model


def unfreeze(model: nn.Sequential) -> None:
    model[0].weight.requires_grad_(True)


def replace(model: nn.Sequential) -> None:
    model[2].weight = nn.Parameter(torch.zeros(2, 4))


def add_weight_norm(model: nn.Sequential) -> None:
    weight_norm(model[2])


def assign(model: nn.Sequential) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (unfreeze, "0.weight"),
        (replace, "2.weight"),
        (add_weight_norm, "2.parametrizations"),
        (assign, "2.bias"),
    ],
)
def test_a_parameter_that_changed_since_is_named_at_the_next_exchange(change, named):
    model = net()
    weights = Weights(model)
    weights.read(weights.layout)
    change(model)
    with pytest.raises(DistcompError, match=rf"since the model was attached .*{named}.*attach again"):
        weights.read(weights.layout)


def test_a_parameter_that_was_frozen_since_is_averaged_on():
    model = net()
    weights = Weights(model)
    model[2].weight.requires_grad_(False)
    assert weights.read(weights.layout).numel() == weights.layout.numel


def test_what_ddp_was_told_to_ignore_is_left_alone():
    weights = Weights(net(), ["2.weight", "1.running_mean"])
    assert "2.weight" not in weights.layout.names
    assert weights.buffers.names == ("1.running_var",)


def expanded(model: nn.Module) -> None:
    model.register_buffer("scale", torch.ones(1).expand(5))


def complex_(model: nn.Module) -> None:
    model.scale = nn.Parameter(torch.ones(2, dtype=torch.complex64))


def sparse(model: nn.Module) -> None:
    model.register_buffer("scale", torch.eye(2).to_sparse())


@pytest.mark.parametrize(
    ("spoil", "reason"), [(expanded, "share memory"), (complex_, "imaginary part"), (sparse, "not dense")]
)
def test_what_no_flat_buffer_holds_is_refused_by_name(spoil, reason):
    model = net()
    spoil(model)
    with pytest.raises(DistcompError, match=rf"scale is .*{reason}"):
        Weights(model)
