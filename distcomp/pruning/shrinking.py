"""A smaller ordinary model with the same outputs: pruned filters, channels and layers are taken out.

The graph is walked with a *value* for each tensor: which channel each of its features is, and which features
are constants. Channels that are added up, or that belong to one group of a convolution, live or die together.
A channel goes where nobody needs it: each reader's weights for it are zero, or it is a constant that the
reader's bias can take over.
"""

from __future__ import annotations

import copy
import math
import operator
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from distcomp.errors import DistcompError
from distcomp.pruning.known import AVERAGES, ELEMENTWISE, LAYERS, MAX_POOLS, NORMS, PASSING, SUMS
from distcomp.pruning.masks import unwrapped

FLAT = -1


@dataclass(frozen=True)
class Value:
    """A tensor: its features' channels, their numbers where they are constant (float64; else nan), and how
    many dimensions come after the channels' (``FLAT``: none, but each channel may have become several
    features)."""

    channels: tuple[int, ...]
    constants: Tensor
    trail: int

    def features(self, count: int) -> Value:
        """With one entry for each of ``count`` features."""
        times = count // len(self.channels)
        channels = tuple(channel for channel in self.channels for _ in range(times))
        return Value(channels, self.constants.repeat_interleave(times), max(self.trail, 0))

    def fits(self, count: int, trail: int) -> bool:
        """Whether what wants ``count`` features before ``trail`` dimensions may read it."""
        exact = len(self.channels) == count or (self.trail == FLAT and count % len(self.channels) == 0)
        return exact and trail == max(self.trail, 0)


class Shift(nn.Module):
    """``x + shift``, a number for each channel: all that is left of a branch that has become constant."""

    def __init__(self, shift: Tensor, trail: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(shift)
        self.trail = trail

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift.view(-1, *[1] * self.trail)


@dataclass(frozen=True)
class Layer:
    """A linear layer or convolution between its input and its output."""

    module: Any
    x: Value | None
    """None: not known, and left as it is."""
    out: Value
    folded: Tensor
    """What removed inputs leave behind: to be added to the bias, ``[out, in]``; 0 where they cannot go."""


@dataclass
class Walk:
    """What a graph's channels are, walked from inputs to outputs."""

    module: fx.GraphModule
    values: dict[fx.Node, Value | None] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    channelwise: list[tuple[nn.Module, Value]] = field(default_factory=list)
    """Batch norms and shifts, and what they read."""
    branch: tuple[fx.Node, fx.Node, Value] | None = None
    """The first sum one side of which is constant: the sum, its other side, and the constant."""
    parents: list[int] = field(default_factory=list)
    """Of channels that live or die together: a forest."""
    needed: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        parts = dict(self.module.named_modules())
        for node in self.module.graph.nodes:
            self.values[node] = self.visit(node, parts.get(str(node.target)))

    # ------------------------------------------------------------------------------------------- channels

    def fresh(self, constants: Tensor, trail: int) -> Value:
        first = len(self.parents)
        self.parents += range(first, first + len(constants))
        return Value(tuple(range(first, len(self.parents))), constants, trail)

    def root(self, channel: int) -> int:
        while self.parents[channel] != channel:
            self.parents[channel] = channel = self.parents[self.parents[channel]]
        return channel

    def tie(self, channels: Iterable[int]) -> None:
        first, *others = channels
        for other in others:
            self.parents[self.root(other)] = self.root(first)

    def need_all(self, node: fx.Node) -> None:
        """What goes into an operation that is not known here stays as it is."""
        for input_ in node.all_input_nodes:
            value = self.values[input_]
            if value is not None:
                self.needed.update(value.channels)

    def removable(self) -> set[int]:
        """Channels nobody needs; but one of each layer's inputs and of its outputs stays."""
        needed = {self.root(channel) for channel in self.needed}
        for layer in self.layers:
            for value in (layer.x, layer.out):
                if value is not None and needed.isdisjoint(map(self.root, value.channels)):
                    needed.add(self.root(value.channels[0]))
        return {channel for channel in range(len(self.parents)) if self.root(channel) not in needed}

    # ----------------------------------------------------------------------------------------- operations

    def visit(self, node: fx.Node, module: nn.Module | None) -> Value | None:
        inputs = [self.values[input_] for input_ in node.all_input_nodes]
        kind: Any = node.target if node.op != "call_module" else type(module)
        if node.op == "call_module" and self.shared(module):
            kind = None  # two calls would have to agree
        x = inputs[0] if inputs else None
        value: Value | None = None
        if kind in LAYERS:
            value = self.layer(module, x)
        elif x is not None and _flattens(node, module) and x.trail > 0:
            value = Value(x.channels, x.constants, FLAT)
        elif kind in SUMS and len(inputs) == 2:
            value = self.sum(node)
        elif x is not None and len(inputs) == 1:
            value = self.single(node, kind, module, x)
        if value is None:
            if not _asks_for_the_batch(node):
                self.need_all(node)
        elif _in_place(node, module):
            self.values[node.all_input_nodes[0]] = value
        return value

    def shared(self, module: nn.Module | None) -> bool:
        """Whether a module, or a parameter of it, is used more than once."""
        mine = {id(parameter) for parameter in module.parameters()} if module is not None else set()
        return sum(not mine.isdisjoint(_used(self.module, node)) for node in self.module.graph.nodes) > 1

    def single(self, node: fx.Node, kind: Any, module: Any, x: Value) -> Value | None:
        """Operations of one input that mix no channels."""
        if kind in NORMS or kind is Shift:
            per_channel = list(_per_channel(module).values())
            count = len(per_channel[0]) if per_channel else len(x.channels)
            if not x.fits(count, max(x.trail, 0)):
                return None
            x = x.features(count)
            self.channelwise.append((module, x))
            return Value(x.channels, _shifted(module, x.constants), x.trail)
        if kind in ELEMENTWISE:
            return Value(x.channels, _applied(node, module, x.constants), x.trail)
        if kind in PASSING:
            constants = x.constants if _unpadded(node, module) else torch.full_like(x.constants, math.nan)
            return Value(x.channels, constants, x.trail)
        return None

    def sum(self, node: fx.Node) -> Value | None:
        first, second = node.all_input_nodes
        a, b = self.values[first], self.values[second]
        if a is None or b is None or node.kwargs or (len(a.channels), a.trail) != (len(b.channels), b.trail):
            return None
        both = a.constants + b.constants
        for side, value, rest, constant in ((first, a, second, b), (second, b, first, a)):
            alone = len(side.users) == len(rest.users) == 1 or not _in_place(node, None)
            if not constant.constants.isnan().any() and constant.trail != FLAT and alone:
                self.branch = self.branch or (node, side, constant)
                return Value(value.channels, both, a.trail)
        for pair in zip(a.channels, b.channels, strict=True):
            self.tie(pair)
        return Value(a.channels, both, a.trail)

    def layer(self, module: Any, x: Value | None) -> Value | None:
        """Who is needed of the inputs, and which outputs are constant."""
        trail, groups = module.weight.dim() - 2, getattr(module, "groups", 1)
        weight = (
            module.weight.detach().double().cpu().flatten(2) if trail else _exact(module.weight)[..., None]
        )
        alive, total = (_block_diagonal(tensor, groups) for tensor in ((weight != 0).any(2), weight.sum(2)))
        if x is not None and not x.fits(alive.shape[1], trail):
            return None
        if x is None:
            constants = torch.full((alive.shape[1],), math.nan, dtype=torch.float64)
        else:
            x = x.features(alive.shape[1])
            constants = x.constants
        folds = ~constants.isnan() if _unpadded(None, module) else constants == 0
        folded = total * constants.where(folds, 0.0)
        out = folded.sum(1) + (0.0 if module.bias is None else _exact(module.bias))
        out[(alive & ~folds).any(1)] = math.nan
        value = self.fresh(out, trail)
        if groups > 1:
            self.tie_groups(x, value, groups)
        elif x is not None:
            read = (alive.any(0) & ~folds).tolist()
            self.needed.update(channel for channel, is_read in zip(x.channels, read, strict=True) if is_read)
        self.layers.append(Layer(module, x, value, folded))
        return value

    def tie_groups(self, x: Value | None, out: Value, groups: int) -> None:
        """A group of a convolution goes as a whole."""
        if x is None:
            self.needed.update(out.channels)
            return
        ins, outs = len(x.channels) // groups, len(out.channels) // groups
        for group in range(groups):
            self.tie(
                x.channels[group * ins : (group + 1) * ins] + out.channels[group * outs : (group + 1) * outs]
            )


def _exact(parameter: Tensor) -> Tensor:
    return parameter.detach().double().cpu()


def _block_diagonal(rows: Tensor, groups: int) -> Tensor:
    """``[out, in / groups]`` as ``[out, in]``."""
    blocks: Tensor = torch.block_diag(*rows.chunk(groups))  # type: ignore[no-untyped-call]
    return blocks.to(rows.dtype)


def _used(module: fx.GraphModule, node: fx.Node) -> set[int]:
    """The parameters that a node uses."""
    if node.op == "call_module":
        return {id(parameter) for parameter in module.get_submodule(str(node.target)).parameters()}
    if node.op == "get_attr":
        return {id(operator.attrgetter(str(node.target))(module))}
    return set()


def _per_channel(module: nn.Module) -> dict[str, Tensor]:
    """A batch norm's or shift's parameters and buffers that have an entry for each channel."""
    own = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None and tensor.dim() == 1}


def _shifted(module: Any, constants: Tensor) -> Tensor:
    """What a norm, in evaluation, or a shift makes of constants."""
    own = {name: _exact(tensor) for name, tensor in _per_channel(module).items()}
    if isinstance(module, Shift):
        return constants + own["shift"]
    if module.running_mean is None:  # by the batch's own mean and variance
        return torch.where(constants.isnan(), math.nan, own.get("bias", torch.zeros_like(constants)))
    scale: Tensor = own.get("weight", 1.0) / (own["running_var"] + module.eps).sqrt()
    return (constants - own["running_mean"]) * scale + own.get("bias", 0.0)


def _applied(node: fx.Node, module: nn.Module | None, constants: Tensor) -> Tensor:
    known = constants.nan_to_num()
    result: Tensor
    if module is not None:
        result = module(known)
    elif callable(node.target):
        result = node.target(known, *node.args[1:], **node.kwargs)
    else:
        result = getattr(known, node.target)()
    kept: Tensor = torch.where(constants.isnan(), constants, result.double())
    return kept


def _unpadded(node: fx.Node | None, module: Any) -> bool:
    """Whether a constant stays one up to the borders."""
    if module is None:
        return (
            node is None
            or node.target not in AVERAGES
            or (len(node.args) < 4 and "padding" not in node.kwargs)
        )
    padding = getattr(module, "padding", 0)
    none = padding == "valid" or not any(padding if isinstance(padding, Sequence) else (padding,))
    return none or isinstance(module, MAX_POOLS) or getattr(module, "padding_mode", "zeros") != "zeros"


def _in_place(node: fx.Node, module: nn.Module | None) -> bool:
    asked = node.kwargs.get("inplace") if module is None else getattr(module, "inplace", False)
    named = node.op == "call_method" and str(node.target).endswith("_")
    return named or node.target is operator.iadd or bool(asked)


def _flattens(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether all dimensions from the channels' on become one."""
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1)
    if node.target in (torch.flatten, "flatten"):
        return bool((*node.args[1:], *node.kwargs.values()) in ((1,), (1, -1)))
    if node.op == "call_method" and node.target in ("view", "reshape"):
        return len(node.args) == 3 and isinstance(node.args[1], fx.Node) and bool(node.args[2] == -1)
    return False


def _asks_for_the_batch(node: fx.Node) -> bool:
    """``x.size(0)`` or ``x.shape[0]``, which no channel changes."""
    if node.target == "size":
        return bool(node.args[1:] == (0,))
    indexed = all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)
    return node.target is getattr and node.args[1] == "shape" and indexed


# ------------------------------------------------------------------------------------------------ the surgery


def shrink(model: nn.Module) -> fx.GraphModule:
    """A smaller copy of a pruned model, without masks, that computes the same in evaluation.

    Out go filters, units and channels whose weights are zero, or whose readers' are; groups of convolutions
    (depthwise ones' channels) as a whole; and branches of residual connections that have become constant.
    Constants go into the biases of what reads them, where no zero padding is in the way. What flows into an
    operation that is not known here keeps its size.

    The copy's parameters are new: make an optimizer for it. In float32 its outputs differ by rounding. Raises
    DistcompError for a model that torch.fx cannot trace, naming the part that it failed on.

    Source: the networks of Wen et al., Learning structured sparsity, NeurIPS 2016, are shrunk by hand there.
    """
    small = _traced(_plain_copy(model))
    while True:
        walk = Walk(small)
        if walk.branch is not None:
            _cut(small, *walk.branch)
        elif removed := walk.removable():
            _take_out(walk, removed)
        else:
            small.recompile()
            return small


def _plain_copy(model: nn.Module) -> nn.Module:
    """Without masks, and without the pruner, which hangs on the model's hooks."""
    module = unwrapped(model)
    hooks = module._forward_pre_hooks
    module._forward_pre_hooks = OrderedDict()
    try:
        plain = copy.deepcopy(module)
    finally:
        module._forward_pre_hooks = hooks
    for part in list(plain.modules()):
        if parametrize.is_parametrized(part):
            names = list(part.parametrizations)  # type: ignore[arg-type]
            values = {name: getattr(part, name).detach() for name in names}
            # torch's own way would take the property from the class, which a copy shares with the original
            part.__class__ = parametrize.type_before_parametrizations(part)
            del part.parametrizations
            for name, value in values.items():
                part.register_parameter(name, nn.Parameter(value))
    return plain


class _Tracer(fx.Tracer):
    failed = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Shift) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, *rest: Any) -> Any:
        try:
            return super().call_module(m, *rest)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)
            raise


def _traced(model: nn.Module) -> fx.GraphModule:
    tracer = _Tracer()
    try:
        return fx.GraphModule(model, tracer.trace(model), type(model).__name__)
    except Exception as error:  # whatever the model's code raises when it is given no tensors
        part = f"{tracer.failed!r} of {type(model).__name__}" if tracer.failed else type(model).__name__
        raise DistcompError(f"torch.fx cannot trace {part}, so it cannot be shrunk: {error}") from error


def _cut(small: fx.GraphModule, node: fx.Node, kept: fx.Node, constant: Value) -> None:
    """Replace a sum by what of it is not constant."""
    if constant.constants.any():
        name, like = f"shift_{node.name}", next(small.parameters())
        small.add_submodule(name, Shift(constant.constants.to(like), constant.trail))
        with small.graph.inserting_before(node):
            kept = small.graph.call_module(name, (kept,))
    node.replace_all_uses_with(kept)
    orphans = {node}
    for node_ in reversed(small.graph.nodes):
        if node_ in orphans and not node_.users and node_.op != "placeholder":
            orphans.update(node_.all_input_nodes)
            small.graph.erase_node(node_)
    small.delete_all_unused_submodules()


@torch.no_grad()
def _take_out(walk: Walk, removed: set[int]) -> None:
    def kept(value: Value) -> Tensor:
        return torch.tensor([channel not in removed for channel in value.channels], dtype=torch.bool)

    for layer in walk.layers:
        module, rows = layer.module, kept(layer.out)
        columns = torch.ones(layer.folded.shape[1], dtype=torch.bool) if layer.x is None else kept(layer.x)
        weight = module.weight[rows.to(module.weight.device)]
        if getattr(module, "groups", 1) > 1:
            module.groups = module.groups * int(rows.sum()) // len(rows)
        else:
            weight = weight[:, columns.to(weight.device)]
            left = layer.folded[:, ~columns].sum(1)
            if module.bias is not None or left[rows].any():
                old = 0.0 if module.bias is None else _exact(module.bias)
                _put(module, "bias", (old + left).to(weight))
        if module.bias is not None:
            _put(module, "bias", module.bias[rows.to(weight.device)])
        _put(module, "weight", weight)
        names = ("in_features", "out_features") if weight.dim() == 2 else ("in_channels", "out_channels")
        for name, count in zip(names, (columns, rows), strict=True):
            setattr(module, name, int(count.sum()))
    for norm, value in walk.channelwise:
        for name, tensor in _per_channel(norm).items():
            _put(norm, name, tensor[kept(value).to(tensor.device)])
        if isinstance(norm, NORMS):
            norm.num_features = int(kept(value).sum())


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    """In place of a parameter or buffer of another shape."""
    if name in module._buffers:
        module._buffers[name] = value.clone()
    else:
        module._parameters[name] = nn.Parameter(value.clone())
