"""What ranks do with adapters (LoRA) whose factors take turns, and with units that are dropped together."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distcomp
from distcomp.conditional import UnitDropout, alternate_layers
from tests.conditional.depth_jobs import alike

RANK, WORDS = 4, 48
TURNS = tuple(f"model.layers.*.self_attn.*.{factor}" for factor in ("down", "up"))


class Adapter(nn.Module):
    """``y = W x + up down x`` with ``W`` frozen (Hu et al., LoRA, 2021)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def language_model() -> nn.Module:
    """A small Llama of transformers, whose weights are frozen, with adapters beside queries and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, Adapter(getattr(layer.self_attn, name)))
    return model


def words_of(rank: int, step: int) -> Tensor:
    first = torch.randint(WORDS, (4, 1), generator=torch.Generator().manual_seed(100 * rank + step))
    return (first + torch.arange(12)) % WORDS  # each word follows the one before it


def train_by_hand(model: nn.Module, size: int, steps: int) -> None:
    """One process, the mean loss over the ranks, SGD with momentum for the factor whose turn it is."""
    factors = {
        kind: [p for name, p in model.named_parameters() if f".{kind}." in name] for kind in ("down", "up")
    }
    momentum = {p: torch.zeros_like(p) for part in factors.values() for p in part}
    for step in range(steps):
        model.zero_grad()
        loss = torch.stack(
            [model(input_ids=w, labels=w).loss for w in (words_of(rank, step) for rank in range(size))]
        ).mean()
        loss.backward()
        with torch.no_grad():
            for parameter in factors["down" if step % 2 == 0 else "up"]:
                momentum[parameter].mul_(0.9).add_(parameter.grad)
                parameter -= 0.5 * momentum[parameter]


def adapters(rank: int, size: int, method: str, steps: int) -> dict[str, Any]:
    """Factors take turns: distance from one process, bytes of each step, what moved in each."""
    model = language_model()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    oracle = copy.deepcopy(model)
    train_by_hand(oracle, size, steps)
    ddp = DistributedDataParallel(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.5, momentum=0.9)
    turns = alternate_layers(ddp, TURNS)
    sent, moved = [], []
    with distcomp.attach(ddp, optimizer, turns.active_only(method)) as handle:
        for step in range(steps):
            before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            optimizer.zero_grad()
            words = words_of(rank, step)
            ddp(input_ids=words, labels=words).loss.backward()
            optimizer.step()
            sent.append(handle.stats()["last"]["payload_bytes"])
            parameters = dict(model.named_parameters())
            names = {name for name, old in before.items() if not torch.equal(parameters[name], old)}
            moved.append(sorted({name.split(".")[-2] for name in names}))
    turns.remove()
    wanted = dict(oracle.named_parameters())
    parameters = dict(model.named_parameters())
    distance = max((parameters[name] - wanted[name]).abs().max().item() for name in parameters)
    kept = all(torch.equal(parameters[name], old) for name, old in frozen.items())
    return {
        "distance": distance, "alike": alike(model), "sent": sent, "moved": moved,
        "frozen kept": kept, "trained": sum(p.numel() for p in trained),
    }  # fmt: skip


def units(rank: int, size: int, active: bool) -> dict[str, Any]:
    """Units that are dropped under DistributedDataParallel: bytes of each step, and the rows kept in it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    dropout = UnitDropout(ddp, "0", blocks=8, rate=0.5, seed=1)
    sent, kept, dropped_stay = [], [], True
    method: Any = dropout.active_only("identity") if active else "identity"
    with distcomp.attach(ddp, optimizer, method) as handle:
        for step in range(6):
            before = model[0].weight.detach().clone()
            x = torch.randn(8, 32, generator=torch.Generator().manual_seed(10 * rank + step))
            optimizer.zero_grad()
            (ddp(x) - 1).square().mean().backward()
            optimizer.step()
            rows = dropout.rows.kept(step)
            kept.append(int(rows.sum()))
            dropped_stay &= torch.equal(model[0].weight[~rows], before[~rows])
            sent.append(handle.stats()["last"]["payload_bytes"])
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return {"sent": sent, "kept": kept, "alike": alike(model), "stay": dropped_stay, "weights": weights}
