"""A small language model that reads Python's own standard library, byte by byte.

A plain DistributedDataParallel script: a transformer of about 900,000 parameters, with one line of distcomp
in it. Every worker reads modules of its own. Start it in any of these ways::

    python examples/bytes_lm.py                                                    # one worker
    torchrun --nproc-per-node 4 examples/bytes_lm.py --method qsgd:bits=4          # four, unhindered
    distcomp emulate --ranks 4 --rate 100mbit examples/bytes_lm.py --steps 60      # four, on a slow network

The text comes with Python, and so changes a little with its version. Every tenth module is kept for the test.
"""

import argparse
import math
import os
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

import distcomp

BYTES = 256
CONTEXT = 64
WIDTH = 128
HEADS = 4
LAYERS = 4
TEST_TEXTS = 128


def options():
    shown = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=shown)
    method = os.environ.get("DISTCOMP_METHOD", "qsgd:bits=4")
    parser.add_argument("--method", default=method, help="what carries the gradients")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--batch", type=int, default=8, help="texts per worker and step")
    parser.add_argument("--lr", type=float, default=4e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--eval-every", type=int, default=10, help="steps from one test to the next")
    return parser.parse_args()


def modules():
    """The source of every module at the top of the standard library, in order of name."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in paths]


def texts(source, count, generator):
    """``count`` random texts out of ``source``: what to read, and the byte that follows each byte of it."""
    starts = torch.randint(len(source) - CONTEXT, (count, 1), generator=generator)
    windows = source[starts + torch.arange(CONTEXT + 1)].long()
    return windows[:, :-1], windows[:, 1:]


class Block(nn.Module):
    """Attention to what came before, then a layer at each place; each adds to what it read."""

    def __init__(self):
        super().__init__()
        self.before_attention, self.before_layer = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.queries_keys_values = nn.Linear(WIDTH, 3 * WIDTH)
        self.mixed = nn.Linear(WIDTH, WIDTH)
        self.layer = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        count, length, _ = x.shape
        together = self.queries_keys_values(self.before_attention(x))
        heads = together.view(count, length, 3, HEADS, WIDTH // HEADS)
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.mixed(attended.transpose(1, 2).reshape(count, length, WIDTH))
        return x + self.layer(self.before_layer(x))


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.bytes = nn.Embedding(BYTES, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.out = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, BYTES))

    def forward(self, text):
        return self.out(self.blocks(self.bytes(text) + self.places.weight))


def loss_of(scores, following):
    """Nats per byte."""
    return cross_entropy(scores.flatten(0, 1), following.flatten())


def warm_up_then_cosine(step, steps):
    """The share of the highest learning rate: up over the first tenth of the steps, then down to 0."""
    return min(1, 10 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def evaluate(net, text, following):
    scores = net(text)
    return loss_of(scores, following).item(), (scores.argmax(-1) == following).float().mean().item()


def main():
    wanted = options()
    distcomp.init_process_group()
    rank, workers = dist.get_rank(), dist.get_world_size()

    library = modules()
    held_out = torch.cat(library[::10])
    del library[::10]
    mine = torch.cat(library[rank::workers])
    test = texts(held_out, TEST_TEXTS, torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(wanted.seed * workers + rank)

    torch.manual_seed(wanted.seed)
    model = DistributedDataParallel(Reader())
    optimizer = torch.optim.AdamW(model.parameters(), wanted.lr, betas=(0.9, 0.95))
    schedule = LambdaLR(optimizer, lambda step: warm_up_then_cosine(step, wanted.steps))
    handle = distcomp.attach(model, optimizer, wanted.method, seed=wanted.seed)

    train_s = 0.0
    for step in range(1, wanted.steps + 1):
        began_s = time.perf_counter()
        text, following = texts(mine, wanted.batch, draw)
        optimizer.zero_grad()
        loss_of(model(text), following).backward()
        optimizer.step()
        schedule.step()
        train_s += time.perf_counter() - began_s

        if rank == 0 and (step % wanted.eval_every == 0 or step == wanted.steps):
            loss, accuracy = evaluate(model.module, *test)
            handle.log(step=step, train_s=train_s, test_loss=loss, test_accuracy=accuracy)
            print(f"step {step:4}{train_s:8.2f} s  test loss {loss:.3f}  accuracy {accuracy:.1%}", flush=True)

    if rank == 0:
        sent_bytes = handle.stats()["payload_bytes"] / wanted.steps
        print(f"{wanted.method}: each worker sent {sent_bytes:,.0f} bytes per step")
    handle.detach()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
