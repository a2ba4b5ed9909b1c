"""Chains as torch registers them: reading them from a module, writing them into it, and taking them off.

torch appends parametrizations and removes all of a tensor's at once. A list of links is therefore written
anew whenever it changes, and theta keeps the ``nn.Parameter`` that it was wherever its shape allows:
optimizers and DistributedDataParallel go on with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distcomp.errors import DistcompError
from distcomp.parametrize.links import WeightChain, label

ORDER = "parameter_order"
"""Attribute of a list: the names of the module's parameters in the order that they had."""


def registered(module: nn.Module, tensor: str) -> parametrize.ParametrizationList | None:
    """The list of a tensor's parametrizations, if it has any."""
    if not parametrize.is_parametrized(module, tensor):
        return None
    links = module.parametrizations[tensor]  # type: ignore[index]
    assert isinstance(links, parametrize.ParametrizationList)
    return links


def read_chain(module: nn.Module, tensor: str, name: str) -> WeightChain:
    """The chain of a tensor; without links, theta is the parameter itself."""
    links = registered(module, tensor)
    if links is not None:
        return WeightChain(name, links_of(links), theta_of(links))
    return WeightChain(name, (), (module._parameters[tensor],))  # type: ignore[arg-type]


def links_of(links: parametrize.ParametrizationList) -> tuple[nn.Module, ...]:
    """The links of a list, innermost first."""
    return tuple(links.get_submodule(str(position)) for position in range(len(links)))


def theta_of(links: parametrize.ParametrizationList) -> tuple[Tensor, ...]:
    """The tensors that a list decodes, in the order of ``decode``'s parameters."""
    names = ["original"] if links.is_tensor else [f"original{position}" for position in range(links.ntensors)]
    return tuple(getattr(links, name) for name in names)


@torch.no_grad()
def write_chain(module: nn.Module, tensor: str, chain: WeightChain) -> None:
    """Let the module compute with a chain. Parameters stay who they are where their shapes do."""
    before = registered(module, tensor)
    old = theta_of(before) if before is not None else (module._parameters[tensor],)
    theta = _parameters(old, chain.theta)  # type: ignore[arg-type]
    own_class(module)
    if before is None:
        places = _parameter_order(module)
        setattr(module, tensor, _stand_in(theta[0]))
        parametrize.register_parametrization(module, tensor, _Stub(theta), unsafe=True)
    else:
        places = getattr(before, ORDER, [])
    if chain.links:
        _replace(module, tensor, chain.links, theta, places)
    else:
        _take_off(module, tensor, theta[0], places)


def _replace(
    module: nn.Module,
    tensor: str,
    links: tuple[nn.Module, ...],
    theta: tuple[nn.Parameter, ...],
    places: list[str],
) -> None:
    made = parametrize.ParametrizationList([_Stub(theta)], _stand_in(theta[0]), unsafe=True)
    made[0] = links[0]
    made.extend(links[1:])
    for name, parameter in zip(list(made._parameters), theta, strict=True):
        setattr(made, name, parameter)
    setattr(made, ORDER, places)
    made.register_load_state_dict_pre_hook(_same_chain)  # type: ignore[no-untyped-call]
    made.train(module.training)
    module.parametrizations[tensor] = made  # type: ignore[assignment, index, operator]


def _take_off(module: nn.Module, tensor: str, parameter: nn.Parameter, places: list[str]) -> None:
    made = parametrize.ParametrizationList([_Stub((parameter,))], _stand_in(parameter), unsafe=True)
    module.parametrizations[tensor] = made  # type: ignore[assignment, index, operator]
    parametrize.remove_parametrizations(module, tensor, leave_parametrized=False)
    setattr(module, tensor, parameter)
    for name in places:  # state dicts list parameters in the order of their registration
        if name in module._parameters:
            module._parameters[name] = module._parameters.pop(name)


def _parameter_order(module: nn.Module) -> list[str]:
    for others in getattr(module, "parametrizations", {}).values():
        return getattr(others, ORDER, [])
    return list(module._parameters)


def _parameters(old: tuple[nn.Parameter, ...], theta: tuple[Tensor, ...]) -> tuple[nn.Parameter, ...]:
    """Theta as parameters: the old ones with its values if they are as many and of the same shapes."""
    if len(old) != len(theta) or any(
        was.shape != now.shape or was.dtype != now.dtype for was, now in zip(old, theta, strict=True)
    ):
        learns = any(parameter.requires_grad for parameter in old)
        whole = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in theta]
        return tuple(nn.Parameter(tensor, requires_grad=learns) for tensor in whole)  # FSDP2 takes no views
    for parameter, tensor in zip(old, theta, strict=True):
        if tensor is not parameter:
            parameter.copy_(tensor)
    return old


def _stand_in(parameter: Tensor) -> nn.Parameter:
    """torch writes into what it is given with ``set_()``, after which DistributedDataParallel's hooks are
    never called again: it is given a copy."""
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


class _Stub(nn.Module):
    """In the place of the links while torch makes a list: it says how many tensors theta is."""

    def __init__(self, theta: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.theta = [tensor.detach().clone() for tensor in theta]

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.theta[0] if len(self.theta) == 1 else tuple(self.theta)


def own_class(module: nn.Module, base: type[nn.Module] | None = None) -> None:
    """Give a parametrized module a class that no other has, derived from ``base`` if one is given.

    A copied module shares the class that torch made for its parametrizations; torch adds properties to that
    class and takes them from it: the other copy would break. A module without any is given ``base`` itself.
    """
    if not parametrize.is_parametrized(module):
        module.__class__ = base or type(module)
        return
    shared = type(module)
    own = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    bases = shared.__bases__ if base is None else (base,)
    module.__class__ = type(shared.__name__, bases, own)


def _same_chain(
    made: nn.Module, state: dict[str, Any], prefix: str, metadata: object, strict: bool, *rest: object
) -> None:
    """Before a state dict is loaded: refuse, in one sentence, one of another chain."""
    given = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    if not strict or given == set(made.state_dict()):
        return
    assert isinstance(made, parametrize.ParametrizationList)
    path, tensor = prefix.removesuffix(".").split("parametrizations.")
    there = f"holds {', '.join(sorted(given))} of it" if given else "has no parametrization of it"
    raise DistcompError(
        f"{path}{tensor} is described by {', '.join(label(link) for link in links_of(made))} here, and the "
        f"state dict {there}; install the same parametrizations on the model that is loaded, or remove them "
        "here"
    )
