"""Workers that exchange what they predict, not what they differentiate; then one network learns from all.

Two handwritten digits side by side: what is the last digit of their sum? Every worker has labelled images of
its own and a network of its own width. Pairs of other images, without labels, are shared; every 50 steps
workers tell each other their logits of them, in 8 bits. At the end a small student is distilled from the mean
of what all predict::

    torchrun --nproc-per-node 2 examples/codistill.py
    distcomp emulate --ranks 2 --rate 1mbit --delay 50ms --methods codistill:period=50 examples/codistill.py
    distcomp simulate --workers 16 --rate 1mbit --delay 50ms --method codistill examples/codistill.py

Other methods need networks that are alike: ``--widths same`` with ``--method local_sgd``, for instance.
"""

import argparse
import os
import time
from functools import cache

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import distcomp
from distcomp import distill
from distcomp.advice import TrainingTask

HELD_OUT, UNLABELLED, SHARED_PAIRS = 397, 300, 2000


def options(arguments=None):
    shown = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=shown)
    method = os.environ.get("DISTCOMP_METHOD", "codistill:period=50,values=(qsgd:bits=8)")
    parser.add_argument("--method", default=method, help="how workers learn from each other")
    parser.add_argument("--steps", type=int, default=600, help="of training")
    parser.add_argument("--batch", type=int, default=64, help="pairs per worker and step")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--eval-every", type=int, default=100, help="steps from one test to the next")
    parser.add_argument("--widths", choices=("own", "same"), default="own", help="of the workers' networks")
    return parser.parse_args(arguments)


def pairs(images, labels, count, seed):
    """``count`` random pairs side by side, and the last digits of their sums."""
    left, right = torch.randint(len(images), (2, count), generator=torch.Generator().manual_seed(seed))
    return torch.cat([images[left], images[right]], dim=1), (labels[left] + labels[right]) % 10


@cache
def data(rank, workers):
    """This worker's labelled images; the shared pairs, without labels; the test's pairs."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = (images[order].float() - images.float().mean(0)) / images.float().std(), labels[order]
    own = images[HELD_OUT + UNLABELLED :][rank::workers], labels[HELD_OUT + UNLABELLED :][rank::workers]
    unlabelled = slice(HELD_OUT, HELD_OUT + UNLABELLED)
    shared, _ = pairs(images[unlabelled], labels[unlabelled], SHARED_PAIRS, 1)
    return own, shared, pairs(images[:HELD_OUT], labels[:HELD_OUT], 2000, 0)


def network(width):
    return nn.Sequential(
        nn.Linear(128, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


@torch.no_grad()
def evaluate(net, inputs, labels):
    scores = net(inputs)
    return cross_entropy(scores, labels).item(), (scores.argmax(1) == labels).float().mean().item()


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


def training_task(arguments):
    """The same training for `distcomp advise` and `distcomp simulate`, with networks of one width."""
    wanted = options(arguments)

    def batch(worker, workers, step):
        own, _, _ = data(worker, workers)
        return pairs(*own, wanted.batch, (wanted.seed * workers + worker) * 1_000_003 + step)

    _, shared, test = data(0, 1)
    torch.manual_seed(wanted.seed)
    return TrainingTask(
        model=network(96),
        batch=batch,
        loss=cross_entropy,
        optimizer=sgd,
        evaluate=lambda model: dict(zip(("test_loss", "test_accuracy"), evaluate(model, *test), strict=True)),
        shared=shared,
    )


def into_one(logits, shared, steps, seed):
    """A small student of what all workers predict together: no label, no byte more."""
    torch.manual_seed(seed)
    student = network(48)
    teach = distill.Distill(student, distill.KnownLogits(logits), distill.hinton(temperature=2, weight=1.0))
    optimizer = torch.optim.Adam(student.parameters(), 2e-3)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(shared), (64,), generator=draw)
        optimizer.zero_grad()
        teach(shared[rows], keys=rows).backward()
        optimizer.step()
    return student


def main():
    wanted = options()
    distcomp.init_process_group("gloo")
    rank, workers = dist.get_rank(), dist.get_world_size()
    own, shared, test = data(rank, workers)

    torch.manual_seed(wanted.seed * workers + rank)
    model = network(96 + 32 * rank if wanted.widths == "own" else 96)
    optimizer = sgd(model.parameters())
    handle = distcomp.attach(model, optimizer, wanted.method, shared=shared, seed=wanted.seed)

    train_s = 0.0
    for step in range(1, wanted.steps + 1):
        began_s = time.perf_counter()
        inputs, labels = pairs(*own, wanted.batch, (wanted.seed * workers + rank) * 1_000_003 + step)
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        train_s += time.perf_counter() - began_s
        if rank == 0 and (step % wanted.eval_every == 0 or step == wanted.steps):
            loss, accuracy = evaluate(model, *test)
            handle.log(step=step, train_s=train_s, test_loss=loss, test_accuracy=accuracy)
            print(f"step {step:4}{train_s:8.2f} s  test loss {loss:.3f}  accuracy {accuracy:.1%}", flush=True)

    sent_bytes = handle.stats()["payload_bytes"]
    together = handle.exchange(model(shared).detach())  # the mean of all workers' logits, on every rank
    if rank == 0:
        print(f"{wanted.method}: each worker sent {sent_bytes:,.0f} bytes in {wanted.steps} steps")
        _, accuracy = evaluate(into_one(together, shared, wanted.steps, wanted.seed), *test)
        print(f"one small network of what all predict, without labels: accuracy {accuracy:.1%}")
    handle.detach()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
