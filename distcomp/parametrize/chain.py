"""Install a parametrization, remove it again, in any order; and what is there in the meantime."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from distcomp.errors import DistcompError
from distcomp.parametrize import links as algebra
from distcomp.parametrize import registered
from distcomp.parametrize.base import Parametrization
from distcomp.parametrize.links import WeightChain, evaluating

__all__ = ["bits", "chain", "evaluating", "install", "latent", "materialize", "parameters", "remove"]


def install(model: nn.Module, name: str, parametrization: Parametrization) -> Parametrization:
    """Let a parametrization describe the tensor ``name`` (``"weight"``, or ``"fc.weight"`` of a model).

    It takes the place of its :class:`Order` in the tensor's chain, so that a chain does not depend on the
    order of installation. What the module computes with is then ``decode`` of the nearest description of
    what the parametrization found, and the links above it apply to that as before. A link below it (a
    codebook under a structure) is fitted anew to what it now stands for.

    Theta keeps its ``nn.Parameter`` where the shape stays (quantizers, masks). Otherwise the parameters are
    new: make the optimizer, and DistributedDataParallel, afterwards. Returns the parametrization.

    Raises DistcompError for a name that is no parameter, one that several layers share, one that FSDP has
    sharded already; where something stands at the same place; for another shape or type; and inside a
    DistributedDataParallel where parameters would be new.
    """
    located = _Place.of(model, name)
    before = located.chain
    _check_free(model, located, before)
    parametrization.to(before.theta[0].device).train(located.module.training)
    after = algebra.inserted(before, parametrization)
    if isinstance(_uncompiled(model), DistributedDataParallel) and _shapes(before) != _shapes(after):
        raise DistcompError(
            f"{parametrization.label} gives {name} new parameters, which DistributedDataParallel would not "
            "know; install it first"
        )
    located.write(after)
    return parametrization


def remove(
    model: nn.Module,
    name: str,
    which: str | nn.Module | None = None,
    *,
    materialize: bool = True,
    densify: bool = False,
) -> None:
    """Take parametrizations off a tensor: those of the owner ``which``, that one, or (None) all of them.

    ``materialize=True``: the tensor keeps, bit for bit, the value that it computed with in ``eval()``.
    ``materialize=False``: it is as if the link had not been there. Its latent value stays under a quantizer
    or mask, and what is left describes it as nearly as it can.

    In neither does a tensor take a wrong shape: what remains below is fitted anew, what is above stays and
    applies as before. If nothing remains, the tensor is a plain parameter again. Where what remains cannot
    hold the value exactly (``materialize``), or more numbers would be stored than before, ``densify=True`` is
    required: then links that cannot hold it come off as well.

    Raises DistcompError, and changes nothing, where that is not given, and where there is nothing to remove.
    """
    apply([removal(model, name, which, materialize=materialize, densify=densify)])


@dataclass(frozen=True)
class Removal:
    """A removal that is found to be possible, and not done yet."""

    module: nn.Module
    tensor: str
    after: WeightChain


def removal(
    model: nn.Module,
    name: str,
    which: str | nn.Module | None = None,
    *,
    materialize: bool = True,
    densify: bool = False,
) -> Removal:
    """What :func:`remove` would do: see there."""
    located = _Place.of(model, name)
    links = located.chain.links
    taken = [link for link in links if _matches(link, which)]
    if not taken:
        there = ", ".join(algebra.label(link) for link in links) or "nothing"
        raise DistcompError(f"{name} has no parametrization of {which!r} to remove; there is: {there}")
    _check_whole(name, located.chain)
    after = located.chain
    for link in reversed(taken):  # outermost first: less is computed
        if link in after.links:
            after = algebra.without(after, after.links.index(link), materialize, densify)
    return Removal(located.module, located.tensor, after)


def apply(removals: Iterable[Removal]) -> None:
    """Do what was found to be possible."""
    for removal in removals:
        registered.write_chain(removal.module, removal.tensor, removal.after)


def materialize(model: nn.Module) -> nn.Module:
    """Take every chain off, in place: a plain model that computes, in ``eval()``, what it computed. Returns
    it."""
    apply(
        [
            Removal(module, tensor, WeightChain(chain.name, (), (chain.weight(),)))
            for module, tensor, chain in chains(model)
        ]
    )
    return model


def chains(model: nn.Module) -> list[tuple[nn.Module, str, WeightChain]]:
    """Every parameter that has a chain: its module, its name there, the chain."""
    every = [
        (module, tensor, registered.read_chain(module, tensor, f"{path}.{tensor}" if path else tensor))
        for path, module in _unwrapped(model).named_modules()
        if parametrize.is_parametrized(module)
        for tensor in module.parametrizations
    ]
    return [
        of_tensor
        for of_tensor in every
        if all(isinstance(tensor, nn.Parameter) for tensor in of_tensor[2].theta)
    ]


def chain(model: nn.Module, name: str) -> tuple[nn.Module, ...]:
    """The links in the place of a tensor, innermost first; empty for a plain parameter."""
    return _Place.of(model, name).chain.links


def parameters(model: nn.Module, name: str) -> tuple[nn.Parameter, ...]:
    """What is stored and trained for a tensor: theta of its chain, or the plain parameter."""
    theta = _Place.of(model, name).chain.theta
    return tuple(tensor for tensor in theta if isinstance(tensor, nn.Parameter))


def latent(model: nn.Module, name: str, owner: str) -> Tensor:
    """What the innermost link of ``owner`` is given, with its gradient; the weight itself if it has none.

    The parameter, where nothing lies below.
    """
    located = _Place.of(model, name)
    links = located.chain.links
    mine = [position for position, link in enumerate(links) if _matches(link, owner)]
    below = links[: mine[0]] if mine else links
    return algebra.passed(below, located.chain.theta)[0]


def bits(model: nn.Module, name: str | None = None) -> float:
    """What a model's parameters (or one tensor) take to store, for inference: chains as they describe
    them."""
    if name is not None:
        return algebra.stored(_Place.of(model, name).chain).bits
    inside = {
        id(parameter)
        for part in model.modules()
        if isinstance(part, parametrize.ParametrizationList)
        for parameter in part.parameters()
    }
    plain = sum(
        8.0 * parameter.numel() * parameter.element_size()
        for parameter in model.parameters()
        if id(parameter) not in inside
    )
    return plain + sum(algebra.stored(links).bits for _, _, links in chains(model))


@dataclass(frozen=True)
class _Place:
    """A tensor of a module."""

    module: nn.Module
    tensor: str
    chain: WeightChain

    @staticmethod
    def of(model: nn.Module, name: str) -> _Place:
        root = _unwrapped(model)
        path, _, tensor = name.rpartition(".")
        try:
            module = root.get_submodule(path)
        except AttributeError:
            module = nn.Module()
        if not parametrize.is_parametrized(module, tensor) and module._parameters.get(tensor) is None:
            known = ", ".join(parameter_name for parameter_name, _ in root.named_parameters())
            raise DistcompError(f"there is no parameter {name!r}; there are: {known}")
        return _Place(module, tensor, registered.read_chain(module, tensor, name))

    def write(self, after: WeightChain) -> None:
        registered.write_chain(self.module, self.tensor, after)


def _check_free(model: nn.Module, located: _Place, before: WeightChain) -> None:
    owners = sum(
        parameter is before.theta[0]
        for part in _unwrapped(model).modules()
        for parameter in part._parameters.values()
    )
    if owners > 1:
        raise DistcompError(
            f"{before.name} is shared by several layers, which one parametrization cannot serve; untie it"
        )
    _check_whole(before.name, before)


def _check_whole(name: str, chain: WeightChain) -> None:
    if any(hasattr(tensor, "to_local") for tensor in chain.theta):
        raise DistcompError(
            f"{name} is sharded by FSDP already; change its parametrizations before fully_shard()"
        )


def _shapes(chain: WeightChain) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in chain.theta]


def _matches(link: nn.Module, which: str | nn.Module | None) -> bool:
    if which is None or link is which:
        return True
    return isinstance(link, Parametrization) and link.owner == which


def _uncompiled(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module under torch.compile's and DistributedDataParallel's wrappers."""
    inner = _uncompiled(model)
    return inner.module if isinstance(inner, DistributedDataParallel) else inner
