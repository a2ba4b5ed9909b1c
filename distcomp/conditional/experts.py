"""The sparsely-gated mixture of experts: in one process, data-parallel, or with experts spread over ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distcomp.attaching.target import OF_RANK
from distcomp.calls import all_reduce, exchange_counts, gather_rows, route_rows
from distcomp.calls.codec import CodecLike, codec_for
from distcomp.calls.line import line_of
from distcomp.conditional.expert_traffic import MixtureShape, traffic_summary
from distcomp.conditional.gating import Gates, NoisyTopKGate, capacity_of, squared_variation
from distcomp.errors import DistcompError
from distcomp.private_torch import ddp_ignores
from distcomp.process_environment import read_environment
from distcomp.randomness import Key
from distcomp.transports.types import ProcessGroup

TENSORS = ("up", "up_bias", "down", "down_bias")
"""What an expert holds: ``relu(x up + up_bias) down + down_bias``."""


@dataclass(frozen=True)
class Routing:
    """How many tokens went where in the last forward of this rank."""

    tokens: int
    by_expert: tuple[int, ...]
    """Tokens given to each of the E experts, without those above capacity."""
    dropped: int
    """(Token, expert) pairs above capacity, which add nothing."""


class MixtureOfExperts(nn.Module):
    """``y = sum_i G(x)_i E_i(x)``, of the k experts that the gate chooses for each token.

    ``E_i(x) = relu(x up_i + up_bias_i) down_i + down_bias_i``. Pairs (token, expert) are sorted by expert,
    and each expert is one pair of matrix products over its rows.

    With ``parallel``, expert e lives on rank ``e // (E / W)`` of that group. A step routes rows to the ranks
    of their experts and back, by ``wire``, forward and backward: ``4 T k D (W-1) / W`` values of a rank (T
    tokens, width D). Experts' gradients are those of the mean loss over the ranks, and are not reduced, or
    over ``holders`` alone, the ranks that hold the same experts. Wrap the rest of the model with
    DistributedDataParallel or ``fully_shard`` after :func:`keep_experts_local`.

    With ``wire="identity"`` answers and experts' gradients are those of one process with all tokens, bit for
    bit, where width and hidden are multiples of 16 (matrix products depend on how rows are aligned in
    memory).

    After a forward, ``balance_loss`` is ``importance_weight CV(importance)^2 + load_weight CV(load)^2``, of
    sums over all ranks; add it to the loss (:func:`balance_loss`).

    Args:
        width, hidden: of a token, and within an expert.
        experts, k: how many there are, and how many each token is given to.
        parallel: the ranks that the experts are spread over; None: all experts are here.
        wire: the codec of rows, any that :mod:`distcomp.calls` knows: ``"qsgd:bits=8"``. Rows have no
            identity from step to step, so nothing that is lost is owed: use an unbiased codec.
        backward_wire: that of their gradients; as ``wire`` by default.
        holders: the ranks that hold the same experts, if there are several.
        method: by which they all-reduce the experts' gradients.
        balance: the ranks over which tokens are counted, where experts are not spread; ``parallel`` by
        default.
        capacity: a rank gives an expert at most ``ceil(capacity T k / E)`` of its tokens; those that come
            last get nothing from it. None: no limit.

    Source: Shazeer et al., "Outrageously Large Neural Networks", ICLR 2017; capacity: Lepikhin et al.,
    "GShard", ICLR 2021. We differ: one level of gates.

    Raises DistcompError for experts that do not divide among the ranks, and as :mod:`distcomp.calls` does;
    PeerLost naming a rank that is lost.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int = 8,
        k: int = 2,
        *,
        parallel: ProcessGroup | None = None,
        wire: CodecLike = "identity",
        **options: Any,
    ) -> None:
        super().__init__()
        self.options = ExpertOptions(**options)
        self.width, self.hidden, self.experts, self.k = width, hidden, experts, k
        self.parallel, self.wire = parallel, wire
        session = line_of(parallel).session if parallel is not None else None
        self.ranks, self.rank = (session.size, session.rank) if session is not None else (1, 0)
        if experts % self.ranks:
            raise DistcompError(
                f"{experts} experts do not divide among {self.ranks} ranks; choose a multiple of {self.ranks}"
            )
        world = read_environment().size
        if session is not None and self.ranks < world and self.options.holders is None:
            raise DistcompError(
                f"experts that are spread over {self.ranks} of {world} ranks are held by several, whose "
                "weights would part; name them: holders=, a group of the ranks that hold the same experts"
            )
        for codec in (wire, self.options.backward_wire or wire):
            codec_for(codec, torch.float32)
        self.gate = NoisyTopKGate(width, experts, k, self.options.noisy)
        for name, tensor in _begun(width, hidden, self.own, self.options.seed).items():
            setattr(self, name, nn.Parameter(tensor))
            if parallel is not None:  # so that attach() can tell where keep_experts_local was forgotten
                setattr(getattr(self, name), OF_RANK, True)
        self.balance_loss = torch.zeros((), dtype=torch.float32)
        self.routing = Routing(0, (0,) * experts, 0)
        self.register_state_dict_post_hook(_by_expert)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_own_experts)  # type: ignore[no-untyped-call]

    @property
    def own(self) -> range:
        """The experts that live here, of all."""
        each = self.experts // self.ranks
        return range(self.rank * each, (self.rank + 1) * each)

    def extra_repr(self) -> str:
        spread = f", over {self.ranks} ranks by {self.wire}" if self.ranks > 1 else ""
        return f"{self.width}, {self.hidden}, experts={self.experts}, k={self.k}{spread}"

    # How many rows each expert gets is known when the gate has chosen: compiled, it would be anew each time.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``[..., width]``; the answer has its shape."""
        tokens = x.reshape(-1, self.width)
        gates: Gates = self.gate(tokens)
        pairs, counts = self._sorted(gates)
        received = self._told(counts, tokens) if self.ranks > 1 else counts
        self.balance_loss = self._balance(gates)
        rows = tokens[pairs // self.k]
        if self.ranks > 1:
            answered = self._expert_parallel(rows, counts, received)
        else:
            answered = self._run(rows, counts, 1)
        weights = gates.weights.reshape(-1)[pairs, None]
        # Each pair has a place of its own, so the sum over a token's k experts is always in the same order.
        answers = torch.zeros(gates.chosen.numel(), self.width, dtype=answered.dtype, device=x.device)
        answers = answers.index_copy(0, pairs, (answered * weights).to(answers.dtype))
        return answers.view(-1, self.k, self.width).sum(1).view(x.shape).to(x.dtype)

    def _sorted(self, gates: Gates) -> tuple[Tensor, Tensor]:
        """Pairs (``token * k + choice``) sorted by expert, in the order of tokens, without those above
        capacity; and how many each expert has."""
        flat = gates.chosen.reshape(-1)
        pairs = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self.experts)
        factor = self.options.capacity
        if factor is not None:
            most = capacity_of(factor, len(gates.chosen), self.k, self.experts)
            begin = counts.cumsum(0) - counts
            within = torch.arange(len(pairs), device=pairs.device) - begin[flat[pairs]]
            pairs, counts = pairs[within < most], counts.clamp(max=most)
        self.routing = Routing(len(gates.chosen), tuple(counts.tolist()), len(flat) - len(pairs))
        return pairs, counts

    def _run(self, rows: Tensor, counts: Tensor, sources: int) -> Tensor:
        """The own experts' answers; ``rows`` come by expert, ``counts`` by (source, expert)."""
        by_expert = counts.view(sources, -1).sum(0).tolist()
        up, up_bias, down, down_bias = _HeldWeights.apply(  # type: ignore[no-untyped-call]
            Reduction(1 / self.ranks, self.options.holders, self.options.method),
            *(getattr(self, name) for name in TENSORS),
        )
        answers = []
        for expert, piece in enumerate(torch.split(rows, by_expert)):
            hidden = torch.relu(torch.addmm(up_bias[expert], piece, up[expert]))
            answers.append(torch.addmm(down_bias[expert], hidden, down[expert]))
        return torch.cat(answers)

    def _told(self, counts: Tensor, tokens: Tensor) -> Tensor:
        """How many rows each rank will send to each expert here, ``[ranks, experts here]``; and all ranks are
        about to do the same with them."""
        words = (
            f"a mixture of {self.experts} experts of {self.width} x {self.hidden}, rows of {tokens.dtype} by "
            f"{self.wire!s}, back by {self.options.backward_wire or self.wire!s}, gradients "
            f"{torch.is_grad_enabled()}, of tokens {tokens.requires_grad}"
        )
        return exchange_counts(counts.view(self.ranks, -1), words, group=self.parallel)

    def _expert_parallel(self, rows: Tensor, counts: Tensor, received: Tensor) -> Tensor:
        """Rows to where their experts live, and their answers back."""
        backward = self.options.backward_wire or self.wire
        here = len(self.own)
        route = partial(route_rows, codec=self.wire, backward=backward, group=self.parallel, agreed=True)
        to_ranks, from_ranks = counts.view(self.ranks, here).sum(1).tolist(), received.sum(1).tolist()
        routed = route(rows, to_ranks, from_ranks)
        # They come by (source, expert); each expert wants its own together, in the order of the sources.
        expert = torch.arange(here).repeat(self.ranks).repeat_interleave(received.reshape(-1))
        order = torch.argsort(expert, stable=True).to(rows.device)
        answered = self._run(routed[order], received, self.ranks)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return route(answered[back], from_ranks, to_ranks)

    def _balance(self, gates: Gates) -> Tensor:
        """The balancing loss, of importance and load summed over the ranks."""
        sums = torch.stack([gates.importance, gates.load]).float()
        group = self.options.balance if self.options.balance is not None else self.parallel
        if group is not None and torch.is_grad_enabled():
            agreed = self.ranks > 1 and self.options.balance is None  # _told has compared it
            sums = gather_rows(sums[None], group=group, agreed=agreed).sum(0)
        importance, load = squared_variation(sums[0]), squared_variation(sums[1])
        return self.options.importance_weight * importance + self.options.load_weight * load

    def shape_of(self, tokens: int) -> MixtureShape:
        """The numbers that decide what is sent, for so many tokens of a rank and step."""
        ranks = max(self.ranks, 2)
        return MixtureShape(tokens, self.width, self.hidden, self.experts, self.k, ranks)

    def summary(self, tokens: int | None = None, gradients: CodecLike = "identity") -> str:
        """When expert parallelism beats all-reducing the experts' gradients by the codec ``gradients``; for
        the tokens of the last forward, or others."""
        return traffic_summary(self.shape_of(tokens or self.routing.tokens), self.wire, gradients)


@dataclass(frozen=True)
class ExpertOptions:
    """The rarer settings of :class:`MixtureOfExperts`, which describes them."""

    backward_wire: CodecLike | None = None
    holders: ProcessGroup | None = None
    method: CodecLike = "identity"
    balance: ProcessGroup | None = None
    capacity: float | None = None
    importance_weight: float = 0.1
    load_weight: float = 0.1
    noisy: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Reduction:
    """What becomes of the experts' gradients: scaled, and averaged over those who hold the same experts."""

    scale: float
    holders: ProcessGroup | None
    method: CodecLike


class _HeldWeights(torch.autograd.Function):
    """The weights as they are. Their gradients come of all ranks' tokens: the mean loss has a share of
    them."""

    @staticmethod
    def forward(ctx: Any, reduction: Reduction, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.reduction = reduction
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        reduction: Reduction = ctx.reduction
        scaled = [gradient * reduction.scale for gradient in gradients]
        if reduction.holders is not None:
            flat = torch.cat([gradient.reshape(-1) for gradient in scaled])
            all_reduce(flat, reduction.method, op="mean", group=reduction.holders)
            pieces = torch.split(flat, [gradient.numel() for gradient in scaled])
            scaled = [piece.view_as(own) for piece, own in zip(pieces, scaled, strict=True)]
        return (None, *scaled)


def keep_experts_local(model: nn.Module) -> set[nn.Parameter]:
    """Let the wrapper that comes next leave experts that are spread over ranks alone. Call it before it.

    ::

        local = distcomp.conditional.keep_experts_local(model)
        model = DistributedDataParallel(model)                # or
        model = fully_shard(model, ignored_params=local)

    Returns the parameters that are each rank's own.
    """
    local: dict[str, nn.Parameter] = {
        f"{prefix}{name}": parameter
        for prefix, module, name, parameter in _held(model)
        if module.parallel is not None
    }
    for parameter in local.values():
        setattr(parameter, OF_RANK, True)
    ddp_ignores(model, local)
    return set(local.values())


def balance_loss(model: nn.Module) -> Tensor:
    """The sum of the balancing losses of all mixtures in a model, of their last forward."""
    losses = [part.balance_loss for part in model.modules() if isinstance(part, MixtureOfExperts)]
    if not losses:
        raise DistcompError("the model has no MixtureOfExperts; there is nothing to balance")
    return torch.stack(losses).sum()


def _begun(width: int, hidden: int, own: range, seed: int) -> dict[str, Tensor]:
    """The experts' first weights, as nn.Linear has them; the same ones on any number of ranks."""
    pieces: dict[str, list[Tensor]] = {name: [] for name in TENSORS}
    for expert in own:
        generator = Key.of(seed).fold("expert", expert).generator()
        for name, shape in (
            ("up", (width, hidden)), ("up_bias", (hidden,)), ("down", (hidden, width)), ("down_bias",
            (width,)),
        ):  # fmt: skip
            bound = 1 / math.sqrt(width if name.startswith("up") else hidden)
            uniform = torch.rand(shape, generator=generator, dtype=torch.float32)
            pieces[name].append((2 * uniform - 1) * bound)
    return {name: torch.stack(tensors) for name, tensors in pieces.items()}


# ------------------------------------------------------------------ checkpoints: experts go by their number


def expert_key(prefix: str, expert: int, name: str) -> str:
    """Under what an expert's tensor is saved."""
    return f"{prefix}experts.{expert}.{name}"


def _by_expert(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    """A saved mixture names each expert: a rank's part holds its own, and all parts make the whole."""
    assert isinstance(module, MixtureOfExperts)
    for name in TENSORS:
        stacked = state.pop(f"{prefix}{name}", None)
        if stacked is not None:
            for place, expert in enumerate(module.own):
                state[expert_key(prefix, expert, name)] = stacked[place]


def _own_experts(module: nn.Module, state: dict[str, Any], prefix: str, *rest: object) -> None:
    """Take this rank's experts from a checkpoint of any number of ranks, and leave the others."""
    assert isinstance(module, MixtureOfExperts)
    for name in TENSORS:
        pieces = [state.get(expert_key(prefix, expert, name)) for expert in module.own]
        missing = [expert for expert, piece in zip(module.own, pieces, strict=True) if piece is None]
        if missing and f"{prefix}{name}" not in state:
            raise DistcompError(
                f"the checkpoint lacks expert {missing[0]} of {prefix.rstrip('.') or 'the mixture'}; merge "
                "the state dicts of all ranks that saved it"
            )
        for expert in range(module.experts):
            state.pop(expert_key(prefix, expert, name), None)
        if not missing:
            state[f"{prefix}{name}"] = torch.stack([piece for piece in pieces if piece is not None])


def expert_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer remembers of this rank's experts, by expert: momentum that moves with them.

    Tensors only, under names such as ``moe.experts.3.up/exp_avg``. Merge the dicts of all ranks.
    """
    saved: dict[str, Tensor] = {}
    for prefix, module, name, parameter in _held(model):
        for kind, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                for place, expert in enumerate(module.own):
                    saved[f"{expert_key(prefix, expert, name)}/{kind}"] = value[place].clone()
            elif value is not None:
                number = torch.as_tensor(value, dtype=torch.float32)
                saved |= {f"{expert_key(prefix, e, name)}/{kind}": number.clone() for e in module.own}
    return saved


def load_expert_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]
) -> None:
    """Give the optimizer what it remembered of the experts that live here now.

    Raises DistcompError where an expert's part is missing.
    """
    for prefix, module, name, parameter in _held(model):
        first = f"{expert_key(prefix, module.own[0], name)}/"
        kinds = [key.removeprefix(first) for key in saved if key.startswith(first)]
        state = optimizer.state[parameter]
        for kind in kinds:
            keys = [f"{expert_key(prefix, expert, name)}/{kind}" for expert in module.own]
            missing = [key for key in keys if key not in saved]
            if missing:
                raise DistcompError(f"the checkpoint lacks {missing[0]}; merge what all ranks saved")
            pieces = [saved[key] for key in keys]
            whole = torch.stack(pieces)
            state[kind] = whole.to(parameter) if whole.shape == parameter.shape else pieces[0].clone()


def _held(model: nn.Module) -> list[tuple[str, MixtureOfExperts, str, nn.Parameter]]:
    """Each parameter that experts are stacked in: its prefix, mixture and name."""
    return [
        (f"{prefix}." if prefix else "", module, name, getattr(module, name))
        for prefix, module in model.named_modules()
        if isinstance(module, MixtureOfExperts)
        for name in TENSORS
    ]
