"""Chains of parametrizations as values: what is inserted or taken out gives another chain, and touches
nothing.

A link that torch or somebody else registered (``weight_norm``) takes part as a structure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distcomp.errors import DistcompError
from distcomp.parametrize.base import Order, Parametrization, Storage, Tensors


@dataclass(frozen=True)
class WeightChain:
    """Links, innermost first, and theta, which the innermost decodes. ``name`` is for messages."""

    name: str
    links: tuple[nn.Module, ...]
    theta: Tensors

    @property
    def numbers(self) -> int:
        """How many numbers theta is."""
        return sum(tensor.numel() for tensor in self.theta)

    def weight(self) -> Tensor:
        """What is computed with in ``eval()``; without a gradient, drawing no noise."""
        return applied(self.links, self.theta)[0]


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """In evaluation for a while; each part is then in the mode in which it was."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def passed(links: Sequence[nn.Module], theta: Tensors) -> Tensors:
    """Theta through links, in the mode in which they are."""
    for link in links:
        theta = as_tuple(link(*theta))
    return theta


@torch.no_grad()
def applied(links: Sequence[nn.Module], theta: Tensors) -> Tensors:
    """Theta through links, in evaluation."""
    with evaluating(*links):
        return passed(links, theta)


def as_tuple(value: Tensor | Sequence[Tensor]) -> Tensors:
    """One tensor or several, as several."""
    return (value,) if isinstance(value, Tensor) else tuple(value)


def label(link: nn.Module) -> str:
    """How messages call a link."""
    return link.label if isinstance(link, Parametrization) else f"{type(link).__name__} (not of distcomp)"


def order(link: nn.Module) -> Order:
    """Where a link stands in a chain; a foreign one like a structure."""
    return link.order if isinstance(link, Parametrization) else Order.STRUCTURE


@torch.no_grad()
def fitted_below(links: Sequence[nn.Module], target: Tensors) -> tuple[tuple[nn.Module, ...], Tensors]:
    """The links, fitted to what they are to give, and the theta from which they give the nearest to it."""
    fitted: list[nn.Module] = []
    # From the outside in: each link is asked for what it must be given.
    for link in reversed(links):
        if isinstance(link, Parametrization):
            link = link.refit(target[0] if len(target) == 1 else target)
        target = _inverse(link, target)
        fitted.insert(0, link)
    return tuple(fitted), target


def _inverse(link: nn.Module, weight: Tensors) -> Tensors:
    right_inverse: Any = getattr(link, "right_inverse", None)
    if right_inverse is None:
        raise DistcompError(f"{label(link)} has no right_inverse; remove it first")
    return as_tuple(right_inverse(weight[0] if len(weight) == 1 else weight))


@torch.no_grad()
def inserted(before: WeightChain, new: Parametrization) -> WeightChain:
    """The chain with ``new`` at the place of its order; of equals, the last is outermost.

    What stood under it describes, as nearly as it can, what ``new`` needs to describe what it found.
    """
    if new.order <= Order.STRUCTURE:
        for link in before.links:
            if order(link) == new.order:
                raise DistcompError(
                    f"{before.name} is described by {label(link)}; remove that before "
                    f"{new.label} is installed"
                )
    position = sum(order(link) <= new.order for link in before.links)
    below, above = before.links[:position], before.links[position:]
    weight = applied(below, before.theta)
    theta = _inverse(new, weight)
    _try(before.name, new, theta, weight)
    # A quantizer or mask takes the weight as it is: what lies below need not be fitted, which would err.
    if below and same(theta, weight):
        return WeightChain(before.name, (*below, new, *above), before.theta)
    fitted, theta = fitted_below(below, theta)
    return WeightChain(before.name, (*fitted, new, *above), theta)


def _try(name: str, new: Parametrization, theta: Tensors, weight: Tensors) -> None:
    """Decode once, in the mode in which it is, and see that the weight keeps its shape and type."""
    if new.changes_dtype:
        return
    given = passed([new], theta)
    wrong = [
        f"{tuple(now.shape)} of {now.dtype}, not {tuple(was.shape)} of {was.dtype}"
        for now, was in zip(given, weight, strict=False)
        if now.shape != was.shape or now.dtype != was.dtype
    ]
    if len(given) != len(weight):
        wrong = [f"{len(given)} tensors, not {len(weight)}"]
    if wrong:
        raise DistcompError(f"{new.label} decodes {name} to {wrong[0]}; make it for this tensor")


@torch.no_grad()
def without(before: WeightChain, position: int, materialize: bool, densify: bool) -> WeightChain:
    """The chain without one link: see :func:`distcomp.parametrize.remove`."""
    below, link, above = before.links[:position], before.links[position], before.links[position + 1 :]
    weight = applied(below, before.theta)
    target = applied([link], weight) if materialize else _restored(link, weight)
    if same(target, weight):
        return WeightChain(before.name, (*below, *above), before.theta)
    fitted, theta = fitted_below(below, target)
    if materialize and below and not same(applied(fitted, theta), target):
        if not densify:
            raise DistcompError(
                f"{before.name}: {' and '.join(label(link_) for link_ in below)} cannot hold exactly what it "
                f"computed with under {label(link)}; remove with materialize=False, or densify=True, which "
                f"stores {sum(tensor.numel() for tensor in target)} numbers and takes these off, too"
            )
        fitted, theta = (), target
    after = WeightChain(before.name, (*fitted, *above), theta)
    if after.numbers > before.numbers and not densify:
        raise DistcompError(
            f"{before.name}: without {label(link)} it stores {after.numbers} numbers, not {before.numbers}; "
            "pass densify=True if that is meant"
        )
    return after


@torch.no_grad()
def _restored(link: nn.Module, theta: Tensors) -> Tensors:
    with evaluating(link):
        restored = link.restore(*theta) if isinstance(link, Parametrization) else link(*theta)
    return as_tuple(restored)


def same(first: Tensors, other: Tensors) -> bool:
    """Whether all tensors are equal, bit for bit (but for the sign of zero)."""
    return len(first) == len(other) and all(
        a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
        for a, b in zip(first, other, strict=True)
    )


@torch.no_grad()
def stored(chain: WeightChain) -> Storage:
    """What the chain takes to store, link by link from theta on."""
    storage = Storage(chain.numbers, 8.0 * chain.theta[0].element_size())
    value = chain.theta
    for link in chain.links:
        value = applied([link], value)
        if isinstance(link, Parametrization):
            storage = link.storage(storage, value)
    return storage
