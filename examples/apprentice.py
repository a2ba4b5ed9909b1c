"""A student of few bits and a teacher of full precision: Apprentice's three schemes, on pairs of digits.

The student's inner layers are ternary. ``--scheme A`` trains both networks together, ``B`` learns from a
teacher that was trained before, ``C`` begins with the student in full precision and goes over to few bits;
``none`` is the control: the same student, the same steps, labels alone. Start it in any of these ways::

    python examples/apprentice.py                                                         # one worker
    torchrun --nproc-per-node 2 examples/apprentice.py --scheme A
    distcomp emulate --ranks 2 --rate 100mbit --methods "ddp; qsgd:bits=4" examples/apprentice.py

A sends two networks in training, and says so.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist
from digits import TEST_PAIRS, digits, evaluate, network, pairs
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import distcomp
from distcomp import distill, precision

RATE = 2e-3


def options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    method = os.environ.get("DISTCOMP_METHOD", "qsgd:bits=4")
    parser.add_argument("--method", default=method, help="what carries the gradients")
    parser.add_argument("--scheme", choices=("A", "B", "C", "none"), default="B")
    parser.add_argument("--steps", type=int, default=200, help="of the student's training")
    parser.add_argument("--before", type=int, default=200, help="steps in full precision, for B and C")
    parser.add_argument("--batch", type=int, default=64, help="pairs per worker and step")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    return parser.parse_args()


def adam(net, rate=RATE):
    return torch.optim.Adam(net.parameters(), rate)


def trained(net, data, steps, seed):
    """In full precision, the same on every worker: nothing is sent."""
    draw, optimizer = torch.Generator().manual_seed(seed), adam(net)
    for _ in range(steps):
        inputs, labels = pairs(*data, 64, draw)
        optimizer.zero_grad()
        cross_entropy(net(inputs), labels).backward()
        optimizer.step()
    return net


def scheme(wanted, data):
    """What is trained, how fast, the student in it, and ``loss(model)``: of a batch and its labels."""
    student = network(64)
    if wanted.scheme == "A":
        both = distill.TeacherAndApprentice(network(192), student, precision.ttq)
        return both, RATE, both.apprentice, lambda model: lambda x, y: distill.joint_loss(*model(x), y)
    if wanted.scheme == "none":
        few_bits = precision.ttq(student)
        return few_bits, RATE, few_bits, lambda model: lambda x, y: cross_entropy(model(x), y)
    teacher, rate = trained(network(192), data, wanted.before, wanted.seed), RATE
    if wanted.scheme == "C":
        trained(student, data, wanted.before, wanted.seed)
        rate = RATE / 4
    few_bits = precision.ttq(student)
    return few_bits, rate, few_bits, lambda model: distill.Distill(model, teacher, distill.apprentice())


def main():
    wanted = options()
    distcomp.init_process_group()
    rank, workers = dist.get_rank(), dist.get_world_size()
    train, held_out = digits()
    mine = train[0][rank::workers], train[1][rank::workers]
    test = pairs(*held_out, TEST_PAIRS, torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(wanted.seed * workers + rank)

    torch.manual_seed(wanted.seed)
    module, rate, student, loss_of = scheme(wanted, train)
    model = DistributedDataParallel(module)
    optimizer, loss = adam(model, rate), loss_of(model)
    handle = distcomp.attach(model, optimizer, wanted.method, seed=wanted.seed)

    train_s = 0.0
    for step in range(1, wanted.steps + 1):
        began_s = time.perf_counter()
        inputs, labels = pairs(*mine, wanted.batch, draw)
        optimizer.zero_grad()
        loss(inputs, labels).backward()
        optimizer.step()
        train_s += time.perf_counter() - began_s
        if rank == 0 and (step % 50 == 0 or step == wanted.steps):
            test_loss, accuracy = evaluate(student, *test)
            handle.log(step=step, train_s=train_s, test_loss=test_loss, test_accuracy=accuracy)
            print(f"step {step:4}{train_s:8.2f} s  test loss {test_loss:.3f}  accuracy {accuracy:.1%}")
    if rank == 0:
        print(f"scheme {wanted.scheme}: {distill.summary(model)}")
        print(f"each worker sent {handle.stats()['payload_bytes'] / wanted.steps:,.0f} bytes per step")
    handle.detach()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
