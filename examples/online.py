"""Networks that teach each other while they learn; one of them is kept.

Two handwritten digits side by side. ``one``: three branches on a stem and their gated ensemble. ``mutual``:
two whole networks. ``kdgan``: a classifier, a teacher and a discriminator. ``single``: the network that is
kept, trained alone, which is the control. Start it in any of these ways::

    python examples/online.py                                                             # one worker
    torchrun --nproc-per-node 2 examples/online.py --networks mutual
    distcomp emulate --ranks 2 --rate 100mbit --methods "ddp; qsgd:bits=4" examples/online.py

All that is trained is sent; what that costs is printed.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist
from digits import TEST_PAIRS, digits, evaluate, network, pairs
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import distcomp
from distcomp import distill

WIDTH = 64


def options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    method = os.environ.get("DISTCOMP_METHOD", "qsgd:bits=4")
    parser.add_argument("--method", default=method, help="what carries the gradients")
    parser.add_argument("--networks", choices=("one", "mutual", "kdgan", "single"), default="one")
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--batch", type=int, default=64, help="pairs per worker and step")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    return parser.parse_args()


def networks_of(name, steps):
    """What is trained, and its loss of a batch: ``loss(model, inputs, labels, step)``."""
    net = network(WIDTH)
    if name == "mutual":
        both = distill.MutualLearners([net, network(WIDTH)])
        return both, lambda model, x, y, step: distill.mutual_loss(model(x), y)
    if name == "kdgan":
        judge = distill.LabelDiscriminator(128, 10)
        game = distill.KDGAN(net, network(2 * WIDTH), judge, temperature=f"1 ~> 0.3 @ {steps}")
        return game, lambda model, x, y, step: model(x, y, step)
    if name == "one":
        branches = distill.OnTheFlyEnsemble(net[:2], net[2:], WIDTH, branches=3)
        weight = f"0 ~> 1 @ {max(1, steps // 2)}"
        return branches, lambda model, x, y, step: distill.ensemble_loss(model(x), y, 3.0, weight, step)
    return net, lambda model, x, y, step: cross_entropy(model(x), y)


def kept(module):
    """The network that is there after training."""
    return nn.Sequential(*module.kept_after_training()) if isinstance(module, distill.TrainsMore) else module


def main():
    wanted = options()
    distcomp.init_process_group()
    rank, workers = dist.get_rank(), dist.get_world_size()
    (images, labels), held_out = digits()
    mine = images[rank::workers], labels[rank::workers]
    test = pairs(*held_out, TEST_PAIRS, torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(wanted.seed * workers + rank)

    torch.manual_seed(wanted.seed)
    module, loss = networks_of(wanted.networks, wanted.steps)
    model = DistributedDataParallel(module)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    handle = distcomp.attach(model, optimizer, wanted.method, seed=wanted.seed)

    train_s = 0.0
    for step in range(1, wanted.steps + 1):
        began_s = time.perf_counter()
        inputs, targets = pairs(*mine, wanted.batch, draw)
        optimizer.zero_grad()
        loss(model, inputs, targets, step).backward()
        optimizer.step()
        train_s += time.perf_counter() - began_s
        if rank == 0 and (step % 50 == 0 or step == wanted.steps):
            test_loss, accuracy = evaluate(kept(module), *test)
            handle.log(step=step, train_s=train_s, test_loss=test_loss, test_accuracy=accuracy)
            print(f"step {step:4}{train_s:8.2f} s  test loss {test_loss:.3f}  accuracy {accuracy:.1%}")
    if rank == 0:
        print(distill.summary(model))
        print(f"each worker sent {handle.stats()['payload_bytes'] / wanted.steps:,.0f} bytes per step")
    handle.detach()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
