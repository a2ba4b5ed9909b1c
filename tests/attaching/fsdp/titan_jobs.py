"""A small Llama on FSDP2, set up by the calls that torchtitan makes, in its order."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import distcomp

from .shard_jobs import flat, mesh_of

TOKENS, WIDTH, LENGTH, BATCH = 29, 12, 10, 3


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5).to(x.dtype) * self.weight


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm(WIDTH)
        self.wqkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.wo = nn.Linear(WIDTH, WIDTH, bias=False)
        self.w1 = nn.Linear(WIDTH, 31)
        self.w2 = nn.Linear(31, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.wqkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.wo(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.w2(nn.functional.silu(self.w1(self.norm(x))))


class Llama(nn.Module):
    """``unused``: a parameter that no forward asks for."""

    def __init__(self, tied: bool = False, unused: bool = False) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleDict({str(index): Block() for index in range(2)})
        self.norm = RMSNorm(WIDTH)
        self.output = nn.Linear(WIDTH, TOKENS, bias=False)
        if tied:
            self.output.weight = self.tok_embeddings.weight
        if unused:
            self.layers["1"].spare = nn.Linear(WIDTH, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            x = layer(x)
        return self.output(self.norm(x))

    def init_weights(self) -> None:
        """From one seed, alike on all ranks and however it is sharded."""
        for index, (name, parameter) in enumerate(self.named_parameters()):
            whole = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) / 4
            whole = torch.ones(parameter.shape) if "norm" in name else whole
            pieces = torch.chunk(whole, parameter.device_mesh.size())
            rank = parameter.device_mesh.get_local_rank()
            own = pieces[rank] if rank < len(pieces) else whole[:0]
            with torch.no_grad():
                parameter.to_local().copy_(own)


def parallelized(size: int, options: dict[str, Any]) -> Llama:
    """torchtitan's ``parallelize_llama`` and what its trainer does before the first step."""
    with torch.device("meta"):
        model = Llama(tied=options.get("tied", False), unused=options.get("unused", False))
    for name, block in model.layers.named_children():
        block = checkpoint_wrapper(block) if options.get("checkpointed") else block
        if options.get("compiled"):
            block.compile(backend="eager")
        model.layers.register_module(name, block)
    policy = MixedPrecisionPolicy(
        param_dtype=options.get("param_dtype"), reduce_dtype=options.get("reduce_dtype", torch.float32)
    )
    config: dict[str, Any] = {"mesh": mesh_of(size)["shard"], "mp_policy": policy}
    if options.get("tied"):
        fully_shard([model.tok_embeddings, model.norm, model.output], **config, reshard_after_forward=True)
    else:
        fully_shard(model.tok_embeddings, **config, reshard_after_forward=True)
    for block in model.layers.values():
        fully_shard(block, **config, reshard_after_forward=options.get("reshard", True))
    if not options.get("tied"):
        fully_shard([model.norm, model.output], **config, reshard_after_forward=False)
    fully_shard(model, **config)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(options.get("factor", 1.0))
            if options.get("sums", True):  # Gloo has no other way to divide by a factor
                module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device="cpu")
    model.init_weights()
    model.train()
    if options.get("prefetch"):
        first, second = model.layers.values()
        model.tok_embeddings.set_modules_to_forward_prefetch([first])
        second.set_modules_to_backward_prefetch([first])
    return model


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    tokens = torch.randint(0, TOKENS, (BATCH, LENGTH + 1), generator=generator)
    return tokens[:, :-1], (3 * tokens[:, :-1] + 1) % TOKENS


def train(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    rank: int,
    size: int,
    steps: range,
    micro: int = 1,
    kept: bool = False,
) -> list[float]:
    """torchtitan's ``train_step``: the loss is a sum over this rank's tokens, divided by all ranks'.

    ``kept``: gathered weights stay from one of the ``micro`` backwards to the next.
    """
    losses = []
    for step in steps:
        optimizer.zero_grad()
        losses.append(0.0)
        for part in range(micro):
            model.set_requires_gradient_sync(part == micro - 1)
            if kept:
                model.set_reshard_after_backward(part == micro - 1)
            inputs, labels = batch(rank, micro * step + part)
            summed = nn.functional.cross_entropy(
                model(inputs).flatten(0, 1).float(), labels.flatten(), reduction="sum"
            )
            loss = summed / (size * micro * labels.numel())
            loss.backward()
            losses[-1] += loss.item() * size
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
    return losses


def titan(
    rank: int, size: int, spec: str | None, options: dict[str, Any], steps: int, attached: dict[str, Any]
) -> tuple[Tensor, list[float], dict[str, Any]]:
    """Weights, losses and statistics of a run; ``spec`` None is FSDP2 by itself."""
    model = parallelized(size, options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with contextlib.ExitStack() as stack:
        handle = distcomp.attach(model, optimizer, spec, **attached) if spec is not None else None
        if handle is not None:
            stack.enter_context(handle)
        micro, kept = options.get("micro", 1), options.get("kept", False)
        losses = train(model, optimizer, rank, size, range(steps), micro, kept)
        stats = handle.stats() if handle is not None else {}
        spared = model.layers["1"].spare.weight.grad if options.get("unused") else None
        stats["unused gradient"] = spared is not None
        return flat(model), losses, stats
