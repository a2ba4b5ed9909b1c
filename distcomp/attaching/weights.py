"""The trained weights of a module as flat tensors: read into a flat buffer, written back from one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distcomp.attaching.slices import slices_of
from distcomp.errors import DistcompError
from distcomp.layout import Layout


class Weights:
    """Parameters that are trained (``requires_grad`` when attached) and floating-point buffers that change.

    A buffer takes part if it is saved with the module and finite: a mask of infinities is no statistic. Flat
    buffers are float32, whatever the type of the parameter; writing rounds to it.

    Raises DistcompError for a module that trains nothing or lies on several devices.
    """

    def __init__(self, module: nn.Module, ignored: frozenset[str] = frozenset()) -> None:
        self._module = module
        self._ignored = ignored
        self.parameters = self._trained()
        devices = {parameter.device for parameter in self.parameters.values()}
        if len(devices) != 1:
            raise DistcompError(
                f"the trained parameters lie on {len(devices)} devices; move the module to one"
            )
        (self.device,) = devices
        slices = slices_of(module)
        self.layout = Layout(tuple(slices[id(parameter)] for parameter in self.parameters.values()))
        self.buffers = Layout.of((name, tuple(buffer.shape)) for name, buffer in self._buffers().items())

    def read(self, layout: Layout) -> Tensor:
        """The flat buffer of some parameters, or pieces of them (a copy, float32)."""
        return _read(self.parameters, layout, self.device)

    def write(self, layout: Layout, buffer: Tensor) -> None:
        """Put a flat buffer back."""
        _write(self.parameters, layout, buffer)

    def read_buffers(self) -> Tensor:
        """The flat buffer of the floating-point buffers."""
        return _read(dict(self._module.named_buffers()), self.buffers, self.device)

    def write_buffers(self, buffer: Tensor) -> None:
        """Put them back."""
        _write(dict(self._module.named_buffers()), self.buffers, buffer)

    def check(self) -> None:
        """Raise DistcompError where the module no longer trains the parameters that it did when attached."""
        known = {id(parameter) for parameter in self.parameters.values()}
        there = {id(parameter) for parameter in self._module.parameters()}
        new = [f"{name} is new or was unfrozen" for name, p in self._trained().items() if id(p) not in known]
        gone = [f"{name} was replaced" for name, p in self.parameters.items() if id(p) not in there]
        changed = gone or new
        if changed:
            raise DistcompError(
                f"{changed[0]} since the method was attached, {len(changed)} parameters in all: nobody would "
                "average them; detach before the model is changed, and attach again"
            )

    def _trained(self) -> dict[str, nn.Parameter]:
        parameters = self._module.named_parameters()
        return {name: p for name, p in parameters if p.requires_grad and name not in self._ignored}

    def _buffers(self) -> dict[str, Tensor]:
        saved = self._module.state_dict(keep_vars=True).keys()
        return {
            name: buffer
            for name, buffer in self._module.named_buffers()
            if name in saved
            and name not in self._ignored
            and buffer.is_floating_point()
            and torch.isfinite(buffer).all()
        }


def _read(tensors: Mapping[str, Tensor], layout: Layout, device: torch.device) -> Tensor:
    pieces = [tensors[s.name].detach().reshape(-1)[s.start : s.stop].to(device) for s in layout.slices]
    return torch.cat(pieces).float() if pieces else torch.empty(0, device=device, dtype=torch.float32)


@torch.no_grad()
def _write(tensors: Mapping[str, Tensor], layout: Layout, buffer: Tensor) -> None:
    for param, piece in layout.pieces(buffer):
        tensor = tensors[param.name].detach()
        flat = tensor.reshape(-1)  # a view, or a copy where the tensor is not contiguous
        flat[param.start : param.stop].copy_(piece)
        if not tensor.is_contiguous():
            tensor.copy_(flat.view(param.shape))
