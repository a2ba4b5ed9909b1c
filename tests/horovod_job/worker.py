"""What every rank does under horovodrun; rank 0 prints the findings as JSON."""

import json
import sys

import horovod.torch as hvd
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from distcomp.collectives import AllGather, AllReduce, AllToAll, Broadcast, NeighborExchange, ReduceScatter
from distcomp.errors import DistcompError
from distcomp.horovod import DistributedOptimizer
from distcomp.payload import Part, Payload
from distcomp.transports.horovod import Horovod

METHODS = ["qsgd:bits=4", "qsgd:bits=1", "powersgd:rank=2", "topk:ratio=0.1", "natural", "onebit"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, 5))


def batch(step):
    generator = torch.Generator().manual_seed(1000 * hvd.rank() + step)
    x = torch.randn(8, 16, generator=generator)
    return x, x[:, :5].argmax(1)


def train(wrap, steps, start=0, model=None, poison=()):
    """Losses, the model and the optimizer after some steps; in ``poison`` ones a gradient is not finite."""
    model = model or network()
    optimizer = wrap(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), model)
    losses = []
    for step in range(start, start + steps):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        (loss * (float("nan") if step in poison and hvd.rank() == 0 else 1.0)).backward()
        if poison:
            optimizer.synchronize()
            if all(p.grad.isfinite().all() for p in model.parameters()):
                with optimizer.skip_synchronize():
                    optimizer.step()
        else:
            optimizer.step()
        losses.append(loss.item())
    return losses, model, optimizer


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def alike(tensor):
    everyone = hvd.allgather(tensor.unsqueeze(0))
    return all(torch.equal(one, everyone[0]) for one in everyone)


def ours(method, **options):
    def wrap(optimizer, model):
        return DistributedOptimizer(optimizer, model.named_parameters(), method, **options)

    return wrap


def theirs(optimizer, model):
    return hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())


def message(value, numel=3):
    payload = Payload.empty((Part("values", torch.float32, numel),), torch.device("cpu"))
    payload["values"].fill_(value)
    return payload


def requests():
    """Every request, and the answers that must come."""
    line, rank, size = Horovod(), hvd.rank(), hvd.size()
    values = lambda buffers: [Payload(one, message(0).parts)["values"][0].item() for one in buffers]  # noqa: E731
    neighbours = tuple(sorted({(rank + 1) % size, (rank - 1) % size}))
    return {
        "sum": line.start(AllReduce(torch.full((5,), float(rank)))).wait().tolist() == [sum(range(size))] * 5,
        "gather": values(line.start(AllGather(message(rank))).wait()) == list(range(size)),
        "swap": values(line.start(AllToAll(tuple(message(10 * rank + to) for to in range(size)))).wait())
        == [10 * sender + rank for sender in range(size)],
        "uneven swap": [one.tolist() for one in uneven_swap(line)]
        == [[10 * sender + rank] * (1 + sender + 2 * rank) for sender in range(size)],
        "reduce-scatter": scattered(line) == [sum(range(1, size + 1)) * rank] * (2 * rank),
        "mix": values(line.start(NeighborExchange(message(rank), neighbours)).wait()) == list(neighbours),
        "broadcast": values(line.start(Broadcast(message(rank), source=1)).wait()) == [1],
    }


def uneven_swap(line):
    rank, everyone = line.rank, range(line.size)
    sent = tuple(message(10 * rank + to, 1 + rank + 2 * to) for to in everyone)
    parts = tuple(message(0, 1 + sender + 2 * rank).parts for sender in everyone)
    wires = line.start(AllToAll(sent, parts)).wait()
    return [Payload(wire, part)["values"] for wire, part in zip(wires, parts, strict=True)]


def scattered(line):
    """Pieces of 0, 2, 4, ... elements, which hold their owner's rank times one more than the sender's."""
    pieces = [torch.full((2 * owner,), float(owner * (line.rank + 1))) for owner in range(line.size)]
    request = ReduceScatter(torch.cat(pieces), tuple(piece.numel() for piece in pieces))
    received = line.start(request).wait()
    return request.open(received, line.rank, line.size, lambda _, parts, wire: Payload(wire, parts)).tolist()


def refused(ask):
    try:
        ask()
    except DistcompError as error:
        return type(error).__name__
    return None


def main():
    hvd.init()
    torch.set_num_threads(1)
    found = {"size": hvd.size(), "requests": requests(), "methods": {}}
    _, plain, _ = train(theirs, 8)
    _, identity, exact = train(ours("identity"), 8)
    found["identity_apart"] = (flat(plain) - flat(identity)).abs().max().item()
    for method in METHODS:
        losses, model, optimizer = train(ours(method), 40)
        found["methods"][method] = {
            "replicas_alike": alike(flat(model)),
            "first_loss": sum(losses[:5]) / 5,
            "last_loss": sum(losses[-5:]) / 5,
            "bytes": optimizer.distcomp.ledger.total_bytes / 40,
        }
    found["exact_bytes"] = exact.distcomp.ledger.total_bytes / 8

    _, whole, _ = train(ours("qsgd:bits=2"), 9)
    _, half, optimizer = train(ours("qsgd:bits=2"), 5)
    # Plain SGD's momentum is not what is tested here: both halves begin with the same one.
    kept, momentum = optimizer.distcomp.state_dict(), optimizer.state_dict()

    fresh = network()  # Horovod's hooks stay on the parameters of a model
    fresh.load_state_dict(half.state_dict())

    def resumed(inner, model):
        wrapped = ours("qsgd:bits=2")(inner, model)
        wrapped.load_state_dict(momentum)
        wrapped.distcomp.load_state_dict(kept)
        return wrapped

    _, again, _ = train(resumed, 4, start=5, model=fresh)
    found["resumed_alike"] = torch.equal(flat(again), flat(whole))

    _, clean, _ = train(ours("qsgd:bits=2"), 6, poison=(99,))
    _, poisoned, scarred = train(ours("qsgd:bits=2"), 6, poison=(3,))
    found["poison_leaves_replicas_alike"] = alike(flat(poisoned))
    found["poison_is_skipped"] = bool(flat(poisoned).isfinite().all()) and not torch.equal(
        flat(clean), flat(poisoned)
    )
    residuals = scarred.distcomp.state_dict()[f"rank{hvd.rank()}"]["state"]
    leaves = [leaf for by_path in residuals.values() for leaf in by_path.values()]
    found["residuals_finite"] = all(leaf.isfinite().all() for leaf in leaves)
    found["mismatch"] = refused(lambda: train(ours(f"qsgd:bits={2 + hvd.rank() % 2}"), 1))
    found["option"] = refused(lambda: train(ours("qsgd:bits=2", op=hvd.AllReduce), 1))
    found["groups"] = refused(lambda: Horovod().start(AllReduce(torch.ones(1), group=(0,))))
    if hvd.rank() == 0:
        print("FOUND", json.dumps(found))
    sys.stdout.flush()


main()
