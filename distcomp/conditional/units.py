"""Block dropout with a mask that all ranks share: rows of a weight that are neither computed nor sent."""

from __future__ import annotations

import itertools
from copy import copy, deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from distcomp.active import OBSERVABLES, ActiveParameters, ActiveSet, Context
from distcomp.averaging.periodic import Periodic
from distcomp.averaging.recipes.masked import active_only
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods import Method, parse
from distcomp.pruning.masks import unwrapped
from distcomp.randomness import Key
from distcomp.schedule import extremes
from distcomp.training import Listener, Source, clock_of

_NUMBERS = itertools.count()


@dataclass(frozen=True)
class KeptRows(ActiveParameters):
    """Rows of ``layer``'s weight and bias whose units are kept in a step, and all of every other
    parameter."""

    layer: str
    units: int
    blocks: int
    rate: float
    seed: int
    observes: str = field(default="", repr=False)
    period: int = 1

    def kept(self, step: int) -> Tensor:
        """Which units are kept: bool ``[units]``, the same on every rank; at least one block is."""
        generator = Key.of(self.seed, step).fold("units", self.layer).generator()
        draws = torch.rand(self.blocks, generator=generator, dtype=torch.float64)
        kept = draws >= self.rate
        kept[draws.argmax()] = True
        return kept.repeat_interleave(self.units // self.blocks)

    def active(self, layout: Layout, context: Context) -> ActiveSet:
        step = context.observed.get(self.observes, context.step) if self.observes else context.step
        assert isinstance(step, int)
        kept = torch.stack([self.kept(at) for at in range(max(0, step - self.period + 1), step + 1)]).any(0)
        masks: dict[str, Tensor | bool] = {}
        for param in layout.slices:
            if param.name in (f"{self.layer}.weight", f"{self.layer}.bias"):
                masks[param.name] = kept.view(-1, *[1] * (len(param.shape) - 1)).expand(param.shape)
        return ActiveSet.of(layout, masks)


class UnitDropout(Listener):
    """Drop blocks of a linear layer's output units in training, the same for the whole batch and on every
    rank.

    ::

        y = mask * (W x + b) / (share kept),    mask constant on each of ``blocks`` blocks of units

    Rows of W and b that are dropped are not computed, their gradient is zero, and a method attached as
    ``units.active_only("qsgd:bits=4")`` does not send them. DistributedDataParallel hands the optimizer a
    zero gradient for them, by which momentum and weight decay act: it is a dropout, not a switch.

    Source: dropout is Srivastava et al., JMLR 2014; blocks that a batch shares: none that we know.

    Raises DistcompError for what is no ``nn.Linear``, blocks that do not divide its units, a rate outside
    [0, 1).
    """

    source: Source = "parameters"

    def __init__(self, model: nn.Module, layer: str, blocks: int, rate: float = 0.5, seed: int = 0) -> None:
        linear_layer = dict(unwrapped(model).named_modules()).get(layer)
        if not isinstance(linear_layer, nn.Linear):
            raise DistcompError(f"{layer} is no nn.Linear of the model; name one as named_modules() does")
        if blocks < 1 or linear_layer.out_features % blocks or not 0 <= rate < 1:
            raise DistcompError(
                f"{blocks} blocks and a rate of {rate} do not fit {linear_layer.out_features} units; choose "
                "a divisor and a rate in [0, 1)"
            )
        self.name = f"unit dropout {next(_NUMBERS)}"
        self.rows = KeptRows(layer, linear_layer.out_features, blocks, rate, seed, self.name)
        self.step = 0
        self._over = False
        self._layer = linear_layer
        OBSERVABLES[self.name] = self
        linear_layer.forward = self._forward  # type: ignore[assignment, method-assign]
        self._clock = clock_of(model)
        self._clock.listen(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> UnitDropout:
        other = copy(self)  # a copy of the model has the same clock, which leads to process groups
        other._layer = deepcopy(self._layer, memo)
        return other

    def snapshot(self) -> int:
        """The iteration under way."""
        return self.step

    def active_only(self, method: Method | str, residuals: str = "keep") -> Any:
        """``method`` for the rows that are kept (:func:`distcomp.averaging.active_only`)."""
        chosen = parse(method) if isinstance(method, str) else method
        period = int(extremes(chosen.period)[1]) if isinstance(chosen, Periodic) else 1
        return active_only(chosen, replace(self.rows, period=period), residuals)

    def backward_ended(self) -> None:
        self._over = True

    def _forward(self, x: Tensor) -> Tensor:
        layer = self._layer
        if not layer.training:
            return linear(x, layer.weight, layer.bias)
        if self._over and self._clock.building:
            self.step, self._over = self.step + 1, False
        kept = self.rows.kept(self.step).to(x.device)
        rows = kept.nonzero().squeeze(1)
        bias = None if layer.bias is None else layer.bias[rows]
        out = x.new_zeros((*x.shape[:-1], len(kept)))
        scaled = linear(x, layer.weight[rows], bias) * (len(kept) / len(rows))
        return out.index_copy(-1, rows, scaled.to(out.dtype))

    def state_dict(self) -> dict[str, Any]:
        """The iteration, of which the masks are functions."""
        return {"rows": repr(self.rows), "step": self.step + self._over}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on with the masks that would have come. Raises DistcompError where settings differ."""
        if saved.get("rows") != repr(self.rows) or not isinstance(saved.get("step"), int):
            raise DistcompError("the checkpoint is of other settings; make the dropout with the same ones")
        self.step, self._over = saved["step"], False

    def remove(self) -> None:
        """Leave the model."""
        self._clock.leave(self)
        self._layer.__dict__.pop("forward", None)
