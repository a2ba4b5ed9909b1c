"""Residual blocks that all ranks leave out of a step together: neither computed nor sent.

Two handwritten digits side by side, as in digits.py, and eight residual blocks. Start it in any of these
ways::

    python examples/stochastic_depth.py                                                  # one worker
    torchrun --nproc-per-node 2 examples/stochastic_depth.py --last 0.5                  # two
    distcomp emulate --ranks 2 --rate 100mbit --methods "identity; qsgd:bits=4" examples/stochastic_depth.py

``--last 1`` drops nothing, for comparison.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist
from digits import TEST_PAIRS, digits, evaluate, pairs
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import distcomp


class Block(nn.Module):
    """``x + f(x)``; f begins as zero, so that a deep net trains from the start."""

    def __init__(self, width):
        super().__init__()
        self.f = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )
        nn.init.zeros_(self.f[-1].weight)

    def forward(self, x):
        return x + self.f(x)


class Net(nn.Module):
    def __init__(self, width, blocks):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(128, width), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


def options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    method = os.environ.get("DISTCOMP_METHOD", "qsgd:bits=4")
    parser.add_argument("--method", default=method, help="what carries the gradients of blocks that ran")
    parser.add_argument("--last", type=float, default=0.5, help="survival probability of the last block")
    parser.add_argument("--steps", type=int, default=100, help="of training")
    parser.add_argument("--batch", type=int, default=128, help="pairs per worker and step")
    parser.add_argument("--width", type=int, default=256, help="of the blocks")
    parser.add_argument("--blocks", type=int, default=8, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and coins")
    return parser.parse_args()


def main():
    wanted = options()
    distcomp.init_process_group()
    rank, workers = dist.get_rank(), dist.get_world_size()
    train, held_out = digits()
    test = pairs(*held_out, TEST_PAIRS, torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(wanted.seed * workers + rank)

    torch.manual_seed(wanted.seed)
    model = DistributedDataParallel(Net(wanted.width, wanted.blocks))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    depth = distcomp.conditional.stochastic_depth(model, "blocks.*", wanted.last, seed=wanted.seed)
    handle = distcomp.attach(model, optimizer, depth.active_only(wanted.method), seed=wanted.seed)

    train_s = 0.0
    for step in range(1, wanted.steps + 1):
        began_s = time.perf_counter()
        inputs, labels = pairs(*train, wanted.batch, draw)
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        train_s += time.perf_counter() - began_s
        if rank == 0 and (step % 20 == 0 or step == wanted.steps):
            model.eval()
            loss, accuracy = evaluate(model.module, *test)
            model.train()
            handle.log(step=step, train_s=train_s, test_loss=loss, test_accuracy=accuracy)
            print(f"step {step:4}{train_s:8.2f} s  test loss {loss:.3f}  accuracy {accuracy:.1%}", flush=True)
    if rank == 0:
        sent_bytes = handle.stats()["payload_bytes"] / wanted.steps
        share = depth.run_layers / (wanted.steps * wanted.blocks)
        print(f"{share:.0%} of the blocks ran; each worker sent {sent_bytes:,.0f} bytes per step")
    handle.detach()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
