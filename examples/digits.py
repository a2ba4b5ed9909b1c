"""Two handwritten digits side by side: what is the last digit of their sum?

A plain DistributedDataParallel script of about 930,000 parameters, with one line of distcomp in it. Every
worker has images of its own, so that one who trains alone sees a part of the data only. Start it in any of
these ways::

    python examples/digits.py                                                      # one worker
    torchrun --nproc-per-node 4 examples/digits.py --method qsgd:bits=4            # four, unhindered
    mpirun -n 4 python examples/digits.py --backend mpi4py                         # four, over MPI
    distcomp emulate --ranks 4 --rate 100mbit examples/digits.py --steps 80        # four, on a slow network

The images ship with scikit-learn: 1797 of them, of which 397 are kept for the test. (Plain digits prove
nothing: there even a worker that trains alone reaches 95 %. Here a linear model gets 11 %.)
"""

import argparse
import math
import os
import time

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

import distcomp
from distcomp.advice import TrainingTask

HELD_OUT_IMAGES = 397
TEST_PAIRS = 4000


def options(arguments=None):
    shown = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=shown)
    method = os.environ.get("DISTCOMP_METHOD", "qsgd:bits=4")
    parser.add_argument("--method", default=method, help="what carries the gradients")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--batch", type=int, default=128, help="pairs per worker and step")
    parser.add_argument("--lr", type=float, default=0.5, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--eval-every", type=int, default=10, help="steps from one test to the next")
    parser.add_argument("--backend", default="gloo", help="of torch.distributed; mpi4py under mpirun")
    parser.add_argument("--save", metavar="FILE", help="where rank 0 puts the trained weights")
    parser.add_argument("--width", type=int, default=896, help="of the hidden layers")
    return parser.parse_args(arguments)


def digits():
    """Images and labels, first to train with and then to test with; the same ones whatever the seed."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order].float(), labels[order]
    train, test = images[HELD_OUT_IMAGES:], images[:HELD_OUT_IMAGES]
    mean, scale = train.mean(0), train.std()
    return (
        ((train - mean) / scale, labels[HELD_OUT_IMAGES:]),
        ((test - mean) / scale, labels[:HELD_OUT_IMAGES]),
    )


def pairs(images, labels, count, generator):
    """``count`` random pairs side by side, and the last digits of their sums."""
    left, right = torch.randint(len(images), (2, count), generator=generator)
    return torch.cat([images[left], images[right]], dim=1), (labels[left] + labels[right]) % 10


def network(width):
    net = nn.Sequential(
        nn.Linear(128, width), nn.GELU(),
        nn.Linear(width, width), nn.GELU(),
        nn.Linear(width, 10),
    )  # fmt: skip
    for layer in net[::2]:
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    return net


def warm_up_then_cosine(step, steps):
    """The share of the highest learning rate: up over the first tenth of the steps, then down to 0."""
    return min(1, 10 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def evaluate(net, inputs, labels):
    scores = net(inputs)
    return cross_entropy(scores, labels).item(), (scores.argmax(1) == labels).float().mean().item()


def sgd(wanted, parameters):
    return torch.optim.SGD(parameters, wanted.lr, momentum=0.8, nesterov=True)


def training_task(arguments):
    """The same training for `distcomp advise` and `distcomp simulate`. Workers draw from all images."""
    wanted = options(arguments)
    train, held_out = digits()
    test = pairs(*held_out, TEST_PAIRS, torch.Generator().manual_seed(0))
    torch.manual_seed(wanted.seed)

    def batch(worker, workers, step):
        draw = torch.Generator().manual_seed((wanted.seed * workers + worker) * 1_000_003 + step)
        return pairs(*train, wanted.batch, draw)

    return TrainingTask(
        model=network(wanted.width),
        batch=batch,
        loss=cross_entropy,
        optimizer=lambda parameters: sgd(wanted, parameters),
        schedule=lambda optimizer: LambdaLR(optimizer, lambda step: warm_up_then_cosine(step, wanted.steps)),
        evaluate=lambda model: dict(zip(("test_loss", "test_accuracy"), evaluate(model, *test), strict=True)),
    )


def main():
    wanted = options()
    distcomp.init_process_group(wanted.backend)
    rank, workers = dist.get_rank(), dist.get_world_size()

    (images, labels), held_out = digits()
    mine = images[rank::workers], labels[rank::workers]
    test = pairs(*held_out, TEST_PAIRS, torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(wanted.seed * workers + rank)

    torch.manual_seed(wanted.seed)
    model = DistributedDataParallel(network(wanted.width))
    optimizer = sgd(wanted, model.parameters())
    schedule = LambdaLR(optimizer, lambda step: warm_up_then_cosine(step, wanted.steps))
    handle = distcomp.attach(model, optimizer, wanted.method, seed=wanted.seed)

    train_s = 0.0
    for step in range(1, wanted.steps + 1):
        began_s = time.perf_counter()
        inputs, targets = pairs(*mine, wanted.batch, draw)
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        schedule.step()
        train_s += time.perf_counter() - began_s

        if rank == 0 and (step % wanted.eval_every == 0 or step == wanted.steps):
            loss, accuracy = evaluate(model.module, *test)
            handle.log(step=step, train_s=train_s, test_loss=loss, test_accuracy=accuracy)
            print(f"step {step:4}{train_s:8.2f} s  test loss {loss:.3f}  accuracy {accuracy:.1%}", flush=True)

    if rank == 0:
        sent_bytes = handle.stats()["payload_bytes"] / wanted.steps
        if wanted.save:
            torch.save(model.module.state_dict(), wanted.save)
        print(f"{wanted.method}: each worker sent {sent_bytes:,.0f} bytes per step")
    handle.detach()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
