"""Any tensor, agreed on by any gradient method, over the line of an attached model: ``handle.exchange``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distcomp.attaching.protocol import Sync
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods import Method, parse
from distcomp.private_torch import NO_BACKWARD, backward_number
from distcomp.runtime.driver import commit, context_of
from distcomp.runtime.saved_state import damaged, described, fitting, whole_number
from distcomp.runtime.states import States
from distcomp.runtime.unanimous import Unanimous

PREFIX = "exchange/"
"""Begins the names under which a checkpoint keeps these states, beside those of parameters."""


@dataclass
class _Named:
    """What is remembered under a name."""

    method: Method
    layout: Layout
    states: States
    count: int


class TensorExchanges:
    """The exchanges of a user's own tensors over an attached line, and what is remembered of them."""

    def __init__(self, sync: Sync, device: torch.device, seed: int) -> None:
        self._sync = sync
        self._device = device
        self._seed = seed
        self._count = 0
        self._named: dict[str, _Named] = {}
        self._loaded: dict[str, Mapping[str, Tensor]] = {}
        self._loaded_said: dict[str, Mapping[str, Any]] = {}

    @torch.no_grad()
    def exchange(self, tensor: Tensor, method: Method | str, name: str | None) -> Tensor:
        """The estimate of the mean; see :meth:`distcomp.Handle.exchange`."""
        chosen = _gradient_method(method)
        self._refuse(tensor, name)
        self._agree(f"{tuple(tensor.shape)} of {tensor.dtype} by {chosen!r}, name={name!r}")
        if tensor.numel() == 0:
            return tensor.detach().clone()
        layout = _layout(f"{PREFIX}{name or ''}", tensor)
        kept = self._named_state(name, chosen, layout)
        context = context_of(self._sync.session.channel, layout, kept.count, self._seed)
        context = replace(context, shared=context.shared.fold("exchange", name or ""))
        x = tensor.detach().reshape(-1).to(torch.float32, copy=True)
        agreed = self._sync.exchange(kept.method, x, kept.states.of(layout, x.device), context)
        estimate = agreed.result().estimate
        commit(kept.states, [agreed.aggregation])
        self._count += name is None
        kept.count += 1
        return estimate.view(tensor.shape).to(tensor.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Counts and methods by name, and states: ``{"exchanges": ..., "state": ...}``."""
        state: dict[str, Any] = {PREFIX + name: dict(leaves) for name, leaves in self._loaded.items()}
        said = {PREFIX: {"count": self._count, "method": ""}}
        said |= {PREFIX + name: dict(each) for name, each in self._loaded_said.items()}
        for name, kept in self._named.items():
            said[PREFIX + name] = {"count": kept.count, "method": described(kept.method)}
            state.update(kept.states.by_parameter())
        return {"exchanges": said, "state": state}

    def load_state_dict(
        self, said: Mapping[str, Mapping[str, Any]], state: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        """Go on from what was saved. A state waits until its name is asked for."""
        self._named.clear()
        self._loaded = {
            name.removeprefix(PREFIX): dict(leaves)
            for name, leaves in state.items()
            if name.startswith(PREFIX)
        }
        self._loaded_said = {name.removeprefix(PREFIX): each for name, each in said.items()}
        unnamed = self._loaded_said.pop("", None)
        self._count = unnamed["count"] if unnamed is not None else 0

    def _refuse(self, tensor: Tensor, name: str | None) -> None:
        sync = self._sync
        if sync.clock.in_forward or backward_number() != NO_BACKWARD or sync.under_way:
            raise DistcompError(
                "handle.exchange was called inside a forward or a backward, whose own exchanges it would cut "
                "in two; call it before the forward, between forward and backward, or after the backward"
            )
        if not tensor.is_floating_point() or tensor.layout != torch.strided or hasattr(tensor, "to_local"):
            raise DistcompError(
                f"handle.exchange takes a dense floating-point tensor, and this one is {tensor.dtype}, "
                f"{tensor.layout}; convert it first"
            )
        if tensor.device.type != self._device.type:
            raise DistcompError(
                f"the tensor lies on {tensor.device} and the attached line carries tensors of "
                f"{self._device.type}; move it there first"
            )
        if name == "":
            raise DistcompError("the name of an exchange is empty; choose another, or leave it out")

    def _named_state(self, name: str | None, method: Method, layout: Layout) -> _Named:
        """What is remembered under ``name``; nothing, without one."""
        if name is None:
            return _Named(method, layout, States(method), self._count)
        if name not in self._named:
            states, said = States(method), self._loaded_said.get(name)
            if said is not None:
                self._check_loaded(name, states, said["method"], method, layout)
                states.load({PREFIX + name: self._loaded.get(name, {})})
            self._named[name] = _Named(method, layout, states, said["count"] if said is not None else 0)
            self._loaded.pop(name, None)
            self._loaded_said.pop(name, None)
        kept = self._named[name]
        if kept.method != method or kept.layout != layout:
            raise DistcompError(
                f"the exchange {name!r} began with {kept.method!r} and shape {kept.layout.slices[0].shape} "
                f"and now comes {method!r} and {layout.slices[0].shape}: its state would mean nothing; use "
                "another name"
            )
        return kept

    def _check_loaded(self, name: str, states: States, saved: str, method: Method, layout: Layout) -> None:
        """Raise DistcompError where what a checkpoint kept under ``name`` is of another method or shape."""
        if saved != described(method):
            raise DistcompError(
                f"the checkpoint kept the exchange {name!r} with {saved}, and now comes {described(method)}: "
                "its state would mean nothing; use the same method, or another name"
            )
        kept = {PREFIX + name: self._loaded.get(name, {})}
        fitting(kept, states.expected(layout, kept), strict=True, whole=True)

    def _agree(self, words: str) -> None:
        """Raise Mismatch on every rank, naming the difference, unless all are about to exchange alike."""
        self._sync.idle()
        layout = Layout.of([("agreement", (1,))])
        context = context_of(self._sync.session.channel, layout, 0, "agreement")
        nothing = torch.zeros(1, device=self._device, dtype=torch.float32)
        asked = Unanimous(words, "call handle.exchange on every rank alike")
        self._sync.exchange(asked, nothing, {}, context).result()


def checked_exchanges(said: object) -> dict[str, dict[str, Any]]:
    """What a checkpoint says of exchanges, by name. Raises DistcompError for what nobody saved."""
    if not isinstance(said, Mapping):
        raise damaged("exchanges", "they are no mapping")
    for name, each in said.items():
        if not isinstance(name, str) or not name.startswith(PREFIX) or not isinstance(each, Mapping):
            raise damaged("exchanges", f"{repr(name)[:80]} is no name of one")
        whole_number(name[:80], "count", each.get("count"), 0)
        if not isinstance(each.get("method"), str):
            raise damaged(name[:80], "its method is no text")
    return {name: {"count": each["count"], "method": each["method"]} for name, each in said.items()}


def _layout(name: str, tensor: Tensor) -> Layout:
    """A tensor of fewer than two dimensions is one row: methods send biases of models as they are, and this
    is none."""
    shape = tuple(tensor.shape) if tensor.dim() >= 2 else (1, tensor.numel())
    return Layout.of([(name, shape)], {name: "matrix"})


def _gradient_method(method: Method | str) -> Method:
    chosen = parse(method) if isinstance(method, str) else method
    if not isinstance(chosen, Method):
        raise DistcompError(
            f"{method!r} is no gradient method, and handle.exchange takes one, such as 'identity' or "
            "'qsgd:bits=4'; choose one"
        )
    chosen.check(None)
    return chosen
