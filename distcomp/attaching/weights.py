"""The trained weights of a module as flat tensors: read into a flat buffer, written back from one."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from distcomp.attaching.slices import slices_of
from distcomp.errors import DistcompError
from distcomp.kernels import memory
from distcomp.layout import Layout

SHOWN = 8  # names of parameters in an error


class Weights:
    """Parameters that are trained (``requires_grad`` when attached) and floating-point buffers that change.

    A buffer takes part if it is saved with the module and finite: a mask of infinities is no statistic. Flat
    buffers are float32, whatever the type of the parameter; writing rounds to it. What is in ``ignored``
    (names that DDP was told to leave alone, such as experts) is each rank's own.

    Raises DistcompError for a module that trains nothing or lies on several devices, for tensors that no flat
    buffer of reals holds (complex, sparse, expanded, distributed), and at every exchange after a parameter
    was replaced or unfrozen.
    """

    def __init__(self, module: nn.Module, ignored: Collection[str] = ()) -> None:
        self._module = module
        self._ignored = frozenset(ignored)
        self.parameters = self._trained()
        for name, tensor in (*self._local().items(), *self._changing()):
            _refuse(name, tensor)
        devices = {parameter.device for parameter in self.parameters.values()}
        if len(devices) != 1:
            raise DistcompError(
                f"the trained parameters lie on {len(devices)} devices; move the module to one"
            )
        (self.device,) = devices
        self.layout = self._layout()
        self.buffers = Layout.of((name, tuple(buffer.shape)) for name, buffer in self._buffers().items())

    def read(self, layout: Layout) -> Tensor:
        """The flat buffer of some parameters, or pieces of them (a copy, float32)."""
        local = self._local()
        self._refuse_changes()
        return _read(local, layout, self.device)

    def write(self, layout: Layout, buffer: Tensor) -> None:
        """Put a flat buffer back."""
        _write(self._local(), layout, buffer)

    def everywhere(self, finite: Tensor) -> Tensor:
        """Whether the whole model was finite (bool), where ``finite`` says it of what is held here."""
        return finite

    def root_mean(self, square: Tensor) -> float:
        """The root mean square of a weight, from the sum of the squares of those that are held here
        (``[1]``)."""
        return float((square.item() / self.layout.numel) ** 0.5)

    def _local(self) -> Mapping[str, Tensor]:
        """What this rank holds of each parameter."""
        return self.parameters

    def _layout(self) -> Layout:
        """What lies where in the flat buffer."""
        slices = slices_of(self._module)
        return Layout(tuple(slices[id(parameter)] for parameter in self.parameters.values()))

    def read_buffers(self) -> Tensor:
        """The flat buffer of the floating-point buffers."""
        return _read(dict(self._module.named_buffers()), self.buffers, self.device)

    def write_buffers(self, buffer: Tensor) -> None:
        """Put them back."""
        _write(dict(self._module.named_buffers()), self.buffers, buffer)

    def _trained(self) -> dict[str, nn.Parameter]:
        return {
            name: parameter
            for name, parameter in self._module.named_parameters()
            if parameter.requires_grad and name not in self._ignored
        }

    def _refuse_changes(self) -> None:
        """Raise where the module's parameters are not those that were found when it was attached: what was
        replaced or unfrozen since would never be averaged."""
        now = dict(self._module.named_parameters())
        gone = [name for name, known in self.parameters.items() if now.get(name) is not known]
        new = [name for name in self._trained() if name not in self.parameters]
        changed = sorted({*gone, *new})
        if changed:
            shown = ", ".join(changed[:SHOWN]) + (", ..." if len(changed) > SHOWN else "")
            raise DistcompError(
                f"{len(changed)} parameters were replaced, added or unfrozen since the model was attached "
                f"({shown}), and would not be averaged; call handle.detach() before such a change and attach "
                "again after it"
            )

    def _changing(self) -> list[tuple[str, Tensor]]:
        """Buffers that are saved with the module."""
        saved = self._module.state_dict(keep_vars=True).keys()
        return [
            (name, buffer)
            for name, buffer in self._module.named_buffers()
            if name in saved and name not in self._ignored and buffer.is_floating_point()
        ]

    def _buffers(self) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self._changing() if torch.isfinite(buffer).all()}


def _refuse(name: str, tensor: Tensor) -> None:
    """Raise for a tensor that no flat buffer of reals holds."""
    what = None
    if tensor.is_complex():
        what = f"complex ({tensor.dtype}), and averaging would lose its imaginary part; keep it as a real "
        what += "tensor of pairs (torch.view_as_real)"
    elif hasattr(tensor, "to_local"):
        what = "a DTensor, of which each rank holds a part; attach before it is distributed, or use FSDP"
    elif tensor.layout != torch.strided:
        what = f"not dense ({tensor.layout}); convert it with to_dense()"
    elif any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        what = "expanded: its elements share memory and cannot be written one by one; clone() it"
    if what is not None:
        raise DistcompError(f"averaging takes dense real tensors, and {name} is {what}")


def _read(tensors: Mapping[str, Tensor], layout: Layout, device: torch.device) -> Tensor:
    flat = memory.empty(layout.numel, device)
    for param, piece in layout.pieces(flat):
        piece.copy_(tensors[param.name].detach().reshape(-1)[param.start : param.stop])
    return flat


@torch.no_grad()
def _write(tensors: Mapping[str, Tensor], layout: Layout, buffer: Tensor) -> None:
    for param, piece in layout.pieces(buffer):
        tensor = tensors[param.name].detach()
        flat = tensor.reshape(-1)  # a view, or a copy where the tensor is not contiguous
        flat[param.start : param.stop].copy_(piece)
        if not tensor.is_contiguous():
            tensor.copy_(flat.view(param.shape))
