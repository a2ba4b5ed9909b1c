"""After SplitNet's cut: each group on a rank of its own, and nothing exchanged for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distcomp.attaching.slices import NORMS
from distcomp.attaching.target import OF_RANK
from distcomp.calls import all_gather
from distcomp.calls.line import line_of
from distcomp.errors import DistcompError
from distcomp.parametrize import Parametrization, chain, install, parameters, remove
from distcomp.parametrize.base import Order, Tensors
from distcomp.parametrize.chain import chains
from distcomp.private_torch import ddp_ignores
from distcomp.process_environment import read_environment
from distcomp.pruning.masks import unwrapped
from distcomp.structured import BlockDiagonal
from distcomp.transports.types import ProcessGroup

MIXING = (*NORMS, nn.Softmax, nn.LogSoftmax)
"""What makes of a feature something that depends on features of other groups, or counts them in a buffer."""


class _Scaled(torch.autograd.Function):
    """The tensor as it is, its gradient times ``scale``."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.scale, None


def _scaled(theta: Sequence[Tensor], ranks: int) -> list[Tensor]:
    """The scores' gradient comes ``ranks`` times as large, for what is averaged: own blocks are not."""
    scaled: list[Tensor] = [_Scaled.apply(tensor, 1 / ranks) for tensor in theta]  # type: ignore[no-untyped-call]
    return scaled


class OwnBlocks(BlockDiagonal):
    """The blocks of this rank's groups; the outputs of the others are zero here. Theta: ``[out_g, in_g,
    *taps]`` of each group held."""

    def __init__(self, cut: BlockDiagonal, own: range, ranks: int) -> None:
        super().__init__(cut.outputs, cut.inputs, cut.groups)
        self.own, self.ranks = own, ranks

    @property
    def held(self) -> Sequence[int]:
        return self.own

    def decode(self, *theta: Tensor) -> Tensor:
        """The weight with zeros wherever another rank has a block."""
        return super().decode(*_scaled(theta, self.ranks))

    def compute(self, layer: nn.Module, x: Tensor, *theta: Tensor) -> Tensor | None:
        return super().compute(layer, x, *_scaled(theta, self.ranks))

    def _in_place(self, y: Tensor, rows: Tensor, dim: int) -> Tensor:
        shape = list(y.shape)
        shape[dim] = len(self.outputs)
        return y.new_zeros(shape).index_copy(dim, rows, y)


class OwnBias(Parametrization):
    """A bias of which this rank's outputs are trained, and the others zero."""

    owner = "structured"
    order = Order.STRUCTURE
    outputs: Tensor

    def __init__(self, cut: OwnBlocks) -> None:
        super().__init__()
        self.own, self.ranks = cut.own, cut.ranks
        # Alike on all ranks, as DistributedDataParallel copies buffers from one to the others.
        self.register_buffer("outputs", cut.outputs.clone(), persistent=False)

    @property
    def rows(self) -> Tensor:
        """The outputs of this rank's groups."""
        return ((self.outputs >= self.own.start) & (self.outputs < self.own.stop)).nonzero().squeeze(1)

    def decode(self, *theta: Tensor) -> Tensor:
        """``[out]``."""
        (own,) = _scaled(theta, self.ranks)
        return own.new_zeros(len(self.outputs)).index_copy(0, self.rows, own)

    def right_inverse(self, weight: Tensor) -> Tensors:
        """What is this rank's."""
        return (weight[self.rows],)


@dataclass
class SpreadGroups:
    """Where groups are: what :func:`spread_groups` returns."""

    model: nn.Module
    layers: tuple[str, ...]
    groups: int
    own: range
    """The groups that live here."""
    parallel: ProcessGroup | None
    ranks: int
    local: set[nn.Parameter] = field(default_factory=set)
    """The parameters that are this rank's own."""
    _seen: Tensor | None = None
    """Of each example in this forward, the mean size of what the first cut layer was given."""

    def see(self, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Before the first cut layer."""
        self._seen = arguments[0].detach().flatten(1).abs().float().mean(1)

    def gathered(self, layer: nn.Module, arguments: object, output: Tensor) -> Tensor:
        """After the last cut layer: the outputs of all groups, on all ranks."""
        cut = _cut_of(self.model, self.layers[-1])
        seen = self._seen
        dim = -1 if isinstance(layer, nn.Linear) else 1
        assert seen is not None
        moved = output.movedim(dim, 0)
        scores: Tensor = _Gathered.apply(moved, seen, cut.outputs, self)  # type: ignore[no-untyped-call]
        return scores.movedim(0, dim)


def _cut_of(model: nn.Module, layer: str) -> BlockDiagonal:
    (cut,) = (link for link in chain(model, f"{layer}.weight") if isinstance(link, BlockDiagonal))
    return cut


def owner_of(group: Tensor, groups: int, ranks: int) -> Tensor:
    """The rank of a group: group g lives on rank ``g // (groups / ranks)``."""
    return group.long() // (groups // ranks)


class _Gathered(torch.autograd.Function):
    """``[features, ...]`` of every rank's own features. Backward: one's own, times the number of ranks."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, seen: Tensor, outputs: Tensor, spread: SpreadGroups) -> Tensor:
        owners = owner_of(outputs, spread.groups, spread.ranks)
        counts = [int((owners == rank).sum()) for rank in range(spread.ranks)]
        mine = (owners == _rank(spread)).nonzero().squeeze(1)
        ctx.mine, ctx.ranks = mine, spread.ranks
        flat = own.reshape(len(own), -1)
        sent = flat.new_zeros(max(counts) * flat.shape[1] + len(seen))
        sent[: len(mine) * flat.shape[1]] = flat[mine].flatten()
        sent[len(sent) - len(seen) :] = seen
        pieces = [torch.empty_like(sent) for _ in counts]
        all_gather(pieces, sent, group=spread.parallel)
        _check_same(seen, [piece[len(sent) - len(seen) :] for piece in pieces])
        whole = torch.empty_like(flat)
        for rank, (piece, count) in enumerate(zip(pieces, counts, strict=True)):
            whole[owners == rank] = piece[: count * flat.shape[1]].view(count, -1)
        return whole.view(own.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        own = torch.zeros_like(gradients[0])
        own[ctx.mine] = gradients[0][ctx.mine] * ctx.ranks
        return own, None, None, None


def _rank(spread: SpreadGroups) -> int:
    return spread.own.start // (spread.groups // spread.ranks)


def _check_same(seen: Tensor, everyone: Sequence[Tensor]) -> None:
    for rank, other in enumerate(everyone):
        if not torch.allclose(other.to(seen), seen, rtol=1e-2, atol=1e-5):
            raise DistcompError(
                f"rank {rank} was given another batch, or its shared layers gave something else for it; "
                "groups that are spread over ranks want the same batch on every rank: draw it from one seed, "
                "without a DistributedSampler, and without dropout before the first cut layer"
            )


def spread_groups(model: nn.Module, parallel: ProcessGroup | None = None) -> SpreadGroups:
    """Let each rank hold its groups of a model that :func:`distcomp.structured.splitnet` has cut, and no
    other.

    Group g lives on rank ``g // (G / W)``, with its blocks, its biases and what the optimizer remembers of
    them. All ranks see the **same batch**, run the shared layers before the cut ones, and their groups. After
    the last cut layer (in the order of the model's modules) every rank has all outputs. With z_g those of
    group g and h what the shared layers give::

        dL/dtheta_g = dL/dz_g dz_g/dtheta_g    on the rank of g, of nobody else's affair
        dL/dh       = sum_g dL/dz_g dz_g/dh    a term on each rank; the wrapper's mean makes the sum

    Wire: of the groups' weights, biases and gradients nothing. Outputs are all-gathered in each forward:
    ``4 B (W-1) (max outputs of a rank + 1)`` bytes of a rank for a batch of B (the 1 tells whether batches
    are alike), nothing backward. The shared layers' gradients go by whatever method is attached.

    Call it on every rank, before the optimizer and DistributedDataParallel, on the model that these are
    given. ``parallel`` holds all ranks that train together; None: the default group. ``state_dict()`` has a
    rank's part, under the names of the cut model; it loads that part or the cut model's state.
    :func:`merge_groups` makes the cut model's state of all parts. An optimizer's ``state_dict()`` is of its
    rank: resume on as many ranks. Clip by :func:`distcomp.conditional.clip_experts_grad_norm_`.

    Source: Kim et al., SplitNet, ICML 2017 (PMLR 70), whose groups are trained in parallel. We differ: the
    softmax over all classes is exact, for which scores are gathered.

    Raises DistcompError where nothing is cut, for groups that do not divide among the ranks, where something
    between the cut layers knows features of other groups; in a forward, where batches differ.
    """
    module = unwrapped(model)
    if module is not model:
        raise DistcompError("groups are spread before the model is wrapped; hand over the plain model")
    session = line_of(parallel).session
    layers, groups = _cut_layers(module)
    world = read_environment().size
    if world != session.size:
        raise DistcompError(
            f"groups on {session.size} of {world} ranks would be held by several, whose weights would part; "
            "spread them over all ranks"
        )
    if groups % session.size:
        raise DistcompError(
            f"{groups} groups do not divide among {session.size} ranks; cut into a multiple of {session.size}"
        )
    _check_between(module, layers)
    each = groups // session.size
    own = range(session.rank * each, (session.rank + 1) * each)
    spread = SpreadGroups(module, layers, groups, own, parallel, session.size)
    for layer in layers:
        _hold(spread, layer)
    module.get_submodule(layers[0]).register_forward_pre_hook(spread.see)
    module.get_submodule(layers[-1]).register_forward_hook(spread.gathered)
    module.register_state_dict_post_hook(partial(_by_group, spread))  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(partial(_own_part, spread))  # type: ignore[no-untyped-call]
    return spread


def _cut_layers(module: nn.Module) -> tuple[tuple[str, ...], int]:
    """The layers that are cut, in the order of the model's modules, and into how many groups."""
    cuts: dict[str, BlockDiagonal] = {}
    for _, _, found in chains(module):
        if found.links and isinstance(found.links[0], BlockDiagonal):
            cuts[found.name.removesuffix(".weight")] = found.links[0]
    counts = {cut.groups for cut in cuts.values()}
    if len(counts) != 1:
        raise DistcompError(
            f"the model has layers cut into {sorted(counts) or 'no'} groups; cut it first, into one number "
            "of them: distcomp.structured.splitnet(model, layers, groups)"
        )
    if any(isinstance(cut, OwnBlocks) for cut in cuts.values()):
        raise DistcompError(f"the groups of {next(iter(cuts))} are spread over ranks already; do it once")
    return tuple(cuts), counts.pop()


def _check_between(module: nn.Module, layers: tuple[str, ...]) -> None:
    """Between the cut layers may stand what takes each feature by itself, and holds nothing."""
    every = [name for name, _ in module.named_modules()]
    for name in every[every.index(layers[0]) : every.index(layers[-1])]:
        part = module.get_submodule(name)
        inside = any(name == layer or name.startswith(f"{layer}.") for layer in layers)
        around = any(layer.startswith(f"{name}.") for layer in layers)
        holds = any(True for _ in part.parameters()) or any(True for _ in part.buffers())
        if not inside and not around and (holds or isinstance(part, MIXING)):
            raise DistcompError(
                f"{name} ({type(part).__name__}) stands between cut layers and would need features of other "
                "ranks' groups; cut it too, or put it before the first cut layer"
            )


@torch.no_grad()
def _hold(spread: SpreadGroups, layer: str) -> None:
    """Put this rank's blocks and bias in the place of all groups'."""
    module, weight = spread.model.get_submodule(layer), f"{layer}.weight"
    cut = _cut_of(spread.model, layer)
    remove(spread.model, weight, cut, densify=True)
    own = OwnBlocks(cut, spread.own, spread.ranks)
    install(spread.model, weight, own)
    names = [weight]
    if module.bias is not None:
        install(spread.model, f"{layer}.bias", OwnBias(own))
        names.append(f"{layer}.bias")
    known = {id(parameter): name for name, parameter in spread.model.named_parameters()}
    for name in names:
        for parameter in parameters(spread.model, name):
            setattr(parameter, OF_RANK, True)
            spread.local.add(parameter)
            ddp_ignores(spread.model, [known[id(parameter)]])


# --------------------------------------------------------------------- checkpoints: groups go by their number


def _keys(prefix: str, layer: str, spread: SpreadGroups) -> tuple[list[str], list[str], str]:
    """The blocks as they are called here and in the cut model, and the bias of this rank."""
    path = f"{prefix}{layer}.parametrizations"
    here = ["original"] if len(spread.own) == 1 else [f"original{place}" for place in range(len(spread.own))]
    there = [f"original{group}" for group in spread.own]
    blocks = [[f"{path}.weight.{name}" for name in names] for names in (here, there)]
    return blocks[0], blocks[1], f"{path}.bias.original"


def group_bias(prefix: str, layer: str, group: int) -> str:
    """Under what a group's part of a bias is saved."""
    return f"{prefix}{layer}.bias.groups.{group}"


def _by_group(
    spread: SpreadGroups, module: nn.Module, state: dict[str, Any], prefix: str, metadata: object
) -> None:
    """A saved rank names the groups that it has."""
    for layer in spread.layers:
        here, there, bias = _keys(prefix, layer, spread)
        blocks = [state.pop(name) for name in here]
        state.update(zip(there, blocks, strict=True))
        if bias in state:
            own = state.pop(bias)
            groups = _groups_of_bias(spread, layer)
            state.update({group_bias(prefix, layer, g): own[groups == g] for g in spread.own})


def _groups_of_bias(spread: SpreadGroups, layer: str) -> Tensor:
    (link,) = chain(spread.model, f"{layer}.bias")
    assert isinstance(link, OwnBias)
    return link.outputs[link.rows]


def _own_part(
    spread: SpreadGroups, module: nn.Module, state: dict[str, Any], prefix: str, *rest: object
) -> None:
    """Take this rank's groups of a rank's part, of all parts together, or of the cut model's state."""
    for layer in spread.layers:
        here, there, bias = _keys(prefix, layer, spread)
        missing = [name for name in there if name not in state]
        if missing:
            raise DistcompError(
                f"the checkpoint lacks {missing[0]}, a group of this rank; load the state of this rank, or "
                "what distcomp.conditional.merge_groups made of all ranks' states"
            )
        blocks = [state[name] for name in there]
        for group in range(spread.groups):
            state.pop(f"{prefix}{layer}.parametrizations.weight.original{group}", None)
        state.update(zip(here, blocks, strict=True))
        whole = state.pop(f"{prefix}{layer}.bias", None)
        parts = {g: state.pop(group_bias(prefix, layer, g), None) for g in range(spread.groups)}
        if bias.removesuffix(".original") in _lists(spread.model, prefix):
            groups = _groups_of_bias(spread, layer)
            link = chain(spread.model, f"{layer}.bias")[0]
            state[bias] = whole[link.rows] if whole is not None else _laid(groups, parts)


def _lists(model: nn.Module, prefix: str) -> set[str]:
    return {f"{prefix}{name}" for name, _ in model.named_modules() if name.endswith(".parametrizations.bias")}


def _laid(groups: Tensor, parts: Mapping[int, Tensor | None]) -> Tensor:
    """Each group's numbers at the places of its features."""
    known = {group: part for group, part in parts.items() if part is not None}
    laid = next(iter(known.values())).new_empty(len(groups))
    for group, part in known.items():
        laid[groups == group] = part
    return laid


def merge_groups(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state dict of the cut model in one process, of the state dicts of all ranks' parts.

    What all have (the shared layers) is taken from the first. The result loads into the model as
    :func:`distcomp.structured.splitnet` cut it, and into parts on any number of ranks that divides the
    groups.

    Raises DistcompError where a group is in no part.
    """
    merged: dict[str, Any] = {}
    for state in reversed(states):
        merged.update(state)
    for key in [key for key in merged if key.endswith(".parametrizations.weight.0.outputs")]:
        path = key.removesuffix(".parametrizations.weight.0.outputs")
        outputs: Tensor = merged[key]
        for group in range(int(outputs.max()) + 1):
            if f"{path}.parametrizations.weight.original{group}" not in merged:
                raise DistcompError(
                    f"no part has group {group} of {path}; merge the state dicts of all ranks"
                )
        parts = {g: merged.pop(group_bias("", path, g), None) for g in range(int(outputs.max()) + 1)}
        if any(part is not None for part in parts.values()):
            merged[f"{path}.bias"] = _laid(outputs, parts)
    return merged
