"""Stochastic depth, and the other ways to train some of a model's layers in a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from distcomp.conditional.choices import Alternating, FrozenFrom, Sampled, Survival
from distcomp.conditional.switch import LayerSwitch, layers_named
from distcomp.errors import DistcompError
from distcomp.process_environment import read_environment
from distcomp.schedule import Schedule, varying
from distcomp.transports.types import ProcessGroup


def stochastic_depth(
    model: nn.Module,
    blocks: str | Iterable[str] = "blocks.*",
    last: float | str | Schedule = 0.5,
    *,
    seed: int = 0,
    shape: str = "linear",
    coins: str = "shared",
    branch: bool = False,
    compare: ProcessGroup | None = None,
) -> LayerSwitch:
    """Drop whole residual blocks in training, at random, the same ones on every rank.

    ::

        training     H_l = x + b_l f_l(x),   b_l ~ Bernoulli(p_l),   p_l = 1 - l / L (1 - p_L)
        evaluation   H_l = x + p_l f_l(x)

    A block whose coin is 0 is neither run forward nor backward. Its parameters have no gradient: the
    optimizer leaves them and their momentum alone, and a method that is attached as
    ``distcomp.attach(model, optimizer, depth.active_only("qsgd:bits=4"))`` does not send them. On the wire
    the share ``mean_l p_l`` of the blocks' bytes, and 40 bytes for each rank and bucket in which ranks
    compare what they dropped. Under FSDP2, where every block is a ``fully_shard`` of its own, weights of
    dropped blocks are not gathered either; give ``compare`` a group there.

    ``coins="private"`` is the control: each rank drops blocks of its own, and everything must be sent.

    Source: Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016. We differ: all ranks share the
    coins, which are functions of ``seed`` and the iteration. A block that ends in a ReLU after its addition
    is scaled as ``x + p (H - x)``, the paper's if ``branch=True`` names its branches instead.

    Raises DistcompError for names that match nothing, probabilities outside [0, 1], unknown ``coins``;
    Mismatch, in training, naming a rank whose coins differ.
    """
    if coins not in ("shared", "private"):
        raise DistcompError(f"coins are 'shared' or 'private', not {coins!r}")
    salt = "" if coins == "shared" else f"rank {read_environment().rank}"
    choice = Survival(layers_named(model, blocks), varying(last), seed, shape, salt)
    return LayerSwitch(model, choice, "skip", branch, compare)


def sample_layers(
    model: nn.Module, layers: str | Iterable[str], k: int = 2, period: int = 1, *, seed: int = 0
) -> LayerSwitch:
    """Train ``k`` of the layers at a time, others anew every ``period`` iterations (LISA).

    All layers run; those that are not drawn pass gradients on and have none of their own, which are neither
    computed nor sent. Source: Pan et al., "LISA", NeurIPS 2024. Raises DistcompError as :class:`LayerSwitch`.
    """
    return LayerSwitch(model, Sampled(layers_named(model, layers), k, period, seed), "freeze")


def alternate_layers(model: nn.Module, groups: Sequence[str | Iterable[str]], period: int = 1) -> LayerSwitch:
    """Train groups of layers in turn, ``period`` iterations each: halves of a model, LoRA's two factors.

    Raises DistcompError as :class:`LayerSwitch`, and where a layer is in two groups.
    """
    named = tuple(layers_named(model, group) for group in groups)
    return LayerSwitch(model, Alternating(named, period), "freeze")


def freeze_layers(model: nn.Module, layers: str | Iterable[str], steps: Sequence[int]) -> LayerSwitch:
    """Freeze each layer from an iteration of its own on: the first of ``steps`` is that of the first layer.

    Source: Brock et al., "FreezeOut", 2017. Raises DistcompError as :class:`LayerSwitch`.
    """
    return LayerSwitch(model, FrozenFrom(layers_named(model, layers), tuple(steps)), "freeze")
