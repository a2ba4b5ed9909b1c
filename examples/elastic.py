"""Pairs of digits on workers that may come and go: training that goes on from its last checkpoint.

torchrun starts all workers anew whenever one is lost or a host comes back; this script then goes on with as
many as there are. Run it on each of two to four hosts that share a folder::

    MASTER_ADDR=node0 NODES=2:4 launchers/torchrun/elastic.sh examples/elastic.py --checkpoints DIR

What is lost is what came after the last checkpoint. What the workers owe each other (the residuals of error
feedback) is not: on another number of workers its mean is kept.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from digits import TEST_PAIRS, digits, evaluate, network, pairs
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import distcomp


def options():
    shown = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=shown)
    parser.add_argument("--checkpoints", type=Path, required=True, metavar="DIR", help="one for all hosts")
    parser.add_argument("--every", type=int, default=20, help="steps from one checkpoint to the next")
    parser.add_argument("--method", default="qsgd:bits=1", help="what carries the gradients")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--batch", type=int, default=128, help="pairs per worker and step")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate")
    parser.add_argument("--width", type=int, default=128, help="of the hidden layers")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for a worker")
    return parser.parse_args()


def save(folder, step, model, optimizer, handle):
    """A folder for this step: the model once, and of every rank what its method remembers. All or nothing."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    unfinished = folder / f"unfinished-{step:06}-of-{workers}"
    unfinished.mkdir(parents=True, exist_ok=True)
    torch.save(handle.state_dict(), unfinished / f"rank{rank}.pt")
    if rank == 0:
        whole = {"step": step, "model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(whole, unfinished / "model.pt")
    dist.barrier()
    if rank == 0:
        unfinished.rename(folder / f"step-{step:06}")


def resume(folder, model, optimizer, handle):
    """Go on from the last checkpoint, whatever the number of workers was. Returns its step, or 0."""
    steps = sorted(folder.glob("step-*"))
    if not steps:
        return 0
    whole = torch.load(steps[-1] / "model.pt", weights_only=True)
    model.module.load_state_dict(whole["model"])
    optimizer.load_state_dict(whole["optimizer"])
    handle.load_state_dict([torch.load(file, weights_only=True) for file in steps[-1].glob("rank*.pt")])
    return whole["step"]


def main():
    wanted = options()
    distcomp.init_process_group()
    rank, workers = dist.get_rank(), dist.get_world_size()
    train, held_out = digits()
    test = pairs(*held_out, TEST_PAIRS, torch.Generator().manual_seed(0))

    torch.manual_seed(0)
    model = DistributedDataParallel(network(wanted.width))
    optimizer = torch.optim.SGD(model.parameters(), wanted.lr, momentum=0.8, nesterov=True)
    handle = distcomp.attach(model, optimizer, wanted.method, timeout_s=wanted.timeout)
    first = resume(wanted.checkpoints, model, optimizer, handle)

    for step in range(first + 1, wanted.steps + 1):
        draw = torch.Generator().manual_seed(1_000_003 * step + rank)
        inputs, targets = pairs(*train, wanted.batch, draw)
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        if rank == 0:
            loss, _ = evaluate(model.module, *test)
            print(f"step {step} workers {workers} test loss {loss:.4f}", flush=True)
        if step % wanted.every == 0 or step == wanted.steps:
            save(wanted.checkpoints, step, model, optimizer, handle)

    handle.detach()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
