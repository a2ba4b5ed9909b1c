"""A student learns from a teacher: pairs of two handwritten digits, most of them without labels.

The teacher, a wide network, has seen all images with their labels; every worker trains it alike, before
anything is sent. The student's workers have labels for a quarter of their pairs. Start it in any of these
ways::

    python examples/distill.py                                                            # one worker
    torchrun --nproc-per-node 2 examples/distill.py --loss mimic
    distcomp emulate --ranks 2 --rate 100mbit --methods "ddp; qsgd:bits=4" examples/distill.py

``--loss hard_labels`` is the control without a teacher, ``--loss pseudo_labels`` takes its likeliest class,
``--loss hint`` pulls a layer in the middle towards the teacher's, too.
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
from distcomp import distill

UNLABELLED = -1
LOSSES = ("hinton", "mimic", "hint", "pseudo_labels", "hard_labels")


def options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    method = os.environ.get("DISTCOMP_METHOD", "qsgd:bits=4")
    parser.add_argument("--method", default=method, help="what carries the student's gradients")
    parser.add_argument("--loss", choices=LOSSES, default="hinton", help="what the student learns")
    parser.add_argument("--steps", type=int, default=200, help="of the student's training")
    parser.add_argument("--teacher-steps", type=int, default=300, help="of the teacher's, before it")
    parser.add_argument("--batch", type=int, default=64, help="pairs per worker and step")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    return parser.parse_args()


def taught(images, labels, steps, seed):
    """The teacher, the same on every worker."""
    torch.manual_seed(seed)
    teacher, draw = network(256), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(teacher.parameters(), 2e-3)
    for _ in range(steps):
        inputs, targets = pairs(images, labels, 128, draw)
        optimizer.zero_grad()
        cross_entropy(teacher(inputs), targets).backward()
        optimizer.step()
    return teacher


def loss_of(name, student, teacher, inputs):
    if name == "hint":  # the first layer's features, through a regressor that is dropped at the end
        regressor = distill.regressor(student, "1", teacher, "1", inputs)
        return distill.hard_labels() + distill.fitnet_hint("1", "1", regressor, weight=0.02)
    if name == "hinton":
        return distill.hinton(temperature=4, weight=0.5)
    return getattr(distill, name)()


def main():
    wanted = options()
    distcomp.init_process_group()
    rank, workers = dist.get_rank(), dist.get_world_size()
    train, held_out = digits()
    test = pairs(*held_out, TEST_PAIRS, torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(wanted.seed * workers + rank)
    mine = train[0][rank::workers], train[1][rank::workers]

    teacher = taught(*train, wanted.teacher_steps, wanted.seed)
    torch.manual_seed(wanted.seed)
    student = network(48)
    loss = loss_of(wanted.loss, student, teacher, mine[0][:2].repeat(1, 2))
    distill.install_heads(student, loss.heads())
    model = DistributedDataParallel(student)
    teach = distill.Distill(model, teacher, loss, seed=wanted.seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    handle = distcomp.attach(model, optimizer, wanted.method, seed=wanted.seed)

    train_s = 0.0
    for step in range(1, wanted.steps + 1):
        began_s = time.perf_counter()
        inputs, labels = pairs(*mine, wanted.batch, draw)
        labels[wanted.batch // 4 :] = UNLABELLED
        optimizer.zero_grad()
        teach(inputs, labels).backward()
        optimizer.step()
        train_s += time.perf_counter() - began_s
        if rank == 0 and (step % 50 == 0 or step == wanted.steps):
            test_loss, accuracy = evaluate(student, *test)
            handle.log(step=step, train_s=train_s, test_loss=test_loss, test_accuracy=accuracy)
            print(f"step {step:4}{train_s:8.2f} s  test loss {test_loss:.3f}  accuracy {accuracy:.1%}")
    if rank == 0:
        print(f"the teacher's accuracy {evaluate(teacher, *test)[1]:.1%}; {teach.summary(inputs)}")
        print(f"each worker sent {handle.stats()['payload_bytes'] / wanted.steps:,.0f} bytes per step")
    handle.detach()
    teach.remove()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
