"""A digit somewhere on a noisy canvas: small whole networks of cheap blocks, with any method on the wire.

Start it in any of these ways::

    python examples/architectures.py --network shift                                   # one worker
    torchrun --nproc-per-node 2 examples/architectures.py --network mobilenet --method qsgd:bits=4
    python examples/architectures.py --network plain --structure circulant=8           # a structure on all
    layers

The images ship with scikit-learn; the canvas is 12 x 12 pixels, or ``--resolution`` times as wide.
"""

import argparse
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from torch.nn.parallel import DistributedDataParallel

import distcomp
from distcomp import blocks, structured
from distcomp.blocks import Geometry

HELD_OUT_IMAGES = 397
CANVAS = 12
CLASSES = 10


def options(arguments=None):
    shown = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=shown)
    method = os.environ.get("DISTCOMP_METHOD", "qsgd:bits=4")
    parser.add_argument("--network", default="mobilenet", choices=NETWORKS, help="which whole network")
    parser.add_argument("--method", default=method, help="what carries the gradients")
    parser.add_argument("--structure", metavar="NAME=NUMBER", help="circulant=8, hashed=16 or low_rank=4")
    parser.add_argument(
        "--width", type=float, default=1.0, help="MobileNets' width multiplier, of all networks"
    )
    parser.add_argument("--resolution", type=float, default=1.0, help="MobileNets' resolution multiplier")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--batch", type=int, default=64, help="images per worker and step")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate, of Adam")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--backend", default="gloo", help="of torch.distributed")
    return parser.parse_args(arguments)


def digits():
    """Images and labels, first to train with and then to test with."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order].float() / 16, labels[order]
    images = (images - images.mean()) / images.std()
    return (images[HELD_OUT_IMAGES:], labels[HELD_OUT_IMAGES:]), (
        images[:HELD_OUT_IMAGES],
        labels[:HELD_OUT_IMAGES],
    )


def shifted(images, labels, count, draw, resolution=1.0):
    """``count`` digits, each at a random place on noise."""
    which = torch.randint(len(images), (count,), generator=draw)
    places = torch.randint(CANVAS - 7, (count, 2), generator=draw).tolist()
    canvas = 0.5 * torch.randn(count, 1, CANVAS, CANVAS, generator=draw)
    for number, (row, column) in enumerate(places):
        canvas[number, 0, row : row + 8, column : column + 8] += images[which[number]].view(8, 8)
    if resolution != 1.0:
        canvas = interpolate(canvas, scale_factor=resolution, mode="bilinear")
    return canvas, labels[which]


# ---------------------------------------------------------------------------------------------- the networks


def classifier(first, blocks_, channels):
    """A first convolution, blocks with a norm and ReLU behind each, halving twice, and a mean of each
    channel."""
    layers = [first, nn.BatchNorm2d(first.out_channels), nn.ReLU()]
    for number, block in enumerate(blocks_):
        layers += [block, nn.BatchNorm2d(channels[number + 1]), nn.ReLU()]
        if number < 2:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, blocks.GlobalAveragePool(), nn.Linear(channels[-1], CLASSES))


def of_blocks(make):
    """The network of a block: two convolutions of 3 x 3 are replaced."""

    def network(width):
        channels = [round(32 * width), round(32 * width), round(64 * width)]
        plain = [nn.Conv2d(channels[n], channels[n + 1], 3, padding=1) for n in range(2)]
        made = [conv if make is None else make(conv) for conv in plain]
        return classifier(nn.Conv2d(1, channels[0], 3, padding=1), made, channels)

    return network


def network_in_network(width):
    """Three mlpconvs; the last gives a channel for each class, whose mean is its score: no dense layer."""
    c = round(32 * width)
    parts = [blocks.MlpConv(Geometry(*pair)) for pair in ((1, c), (c, c), (c, CLASSES))]
    first, second, last = parts
    return nn.Sequential(
        first,
        nn.ReLU(),
        nn.MaxPool2d(2),
        second,
        nn.ReLU(),
        nn.MaxPool2d(2),
        last,
        blocks.GlobalAveragePool(),
    )


def squeeze_net(width):
    """Fire modules and a last convolution with a channel for each class."""
    c = round(32 * width)
    return nn.Sequential(
        nn.Conv2d(1, c, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        blocks.Fire(Geometry(c, c), 0.25), nn.ReLU(),
        blocks.Fire(Geometry(c, 2 * c), 0.25), nn.ReLU(), nn.MaxPool2d(2),
        blocks.Fire(Geometry(2 * c, 2 * c), 0.25), nn.ReLU(),
        nn.Conv2d(2 * c, CLASSES, 1), blocks.GlobalAveragePool(),
    )  # fmt: skip


def e_net(width):
    """ENet's encoder: the first block halves, then regular, dilated and asymmetric bottlenecks."""
    c = round(32 * width)
    kinds = [("regular", 1), ("dilated", 2), ("asymmetric", 1), ("dilated", 4)]
    body = [blocks.ENetBottleneck(Geometry(c, 2 * c, 3, 2))]
    body += [blocks.ENetBottleneck(Geometry(2 * c, 2 * c), kind, dilation) for kind, dilation in kinds]
    return nn.Sequential(
        blocks.ENetInitial(1, c), *body, blocks.GlobalAveragePool(), nn.Linear(2 * c, CLASSES)
    )  # fmt: skip


NETWORKS = {
    "plain": of_blocks(None),
    "mobilenet": of_blocks(blocks.separable()),
    "shift": of_blocks(blocks.shift(3)),
    "shift1": of_blocks(blocks.shift(1)),
    "grouped": of_blocks(blocks.grouped(8)),
    "bottleneck": of_blocks(blocks.bottleneck()),
    "resnext": of_blocks(blocks.resnext(8)),
    "inception": of_blocks(blocks.inception()),
    "fire": of_blocks(blocks.fire()),
    "mlpconv": of_blocks(blocks.mlpconv()),
    "winograd": of_blocks(blocks.winograd()),
    "mec": of_blocks(blocks.mec()),
    "pointwise": of_blocks(lambda conv: nn.Conv2d(conv.in_channels, conv.out_channels, 1)),
    "nin": network_in_network,
    "squeezenet": squeeze_net,
    "enet": e_net,
}


def structure(net, text):
    """``circulant=8``: on every layer but the last."""
    name, _, number = text.partition("=")
    layers = [name_ for name_, part in net.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)][1:-1]
    if name == "circulant":
        structured.circulant(net, int(number), layers=layers, start="variance")
    elif name == "hashed":
        structured.hashed(net, float(number), layers=layers, start="variance")
    elif name == "low_rank":
        structured.low_rank(net, int(number), layers=layers)
    else:
        raise SystemExit(f"--structure is circulant=8, hashed=16 or low_rank=4, not {text!r}")


@torch.no_grad()
def accuracy(net, inputs, labels):
    net.eval()
    right = (net(inputs).argmax(1) == labels).float().mean().item()
    net.train()
    return right


def main():
    wanted = options()
    distcomp.init_process_group(wanted.backend)
    rank, workers = dist.get_rank(), dist.get_world_size()
    (images, labels), held_out = digits()
    mine = images[rank::workers], labels[rank::workers]
    test = shifted(*held_out, 2000, torch.Generator().manual_seed(0), wanted.resolution)
    draw = torch.Generator().manual_seed(wanted.seed * workers + rank)

    torch.manual_seed(wanted.seed)
    net = NETWORKS[wanted.network](wanted.width)
    if wanted.structure:
        structure(net, wanted.structure)
    if rank == 0:
        print(structured.summary(net, test[0][:1]))
    model = DistributedDataParallel(net)
    optimizer = torch.optim.Adam(model.parameters(), wanted.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, wanted.steps)
    handle = distcomp.attach(model, optimizer, wanted.method, seed=wanted.seed)

    for step in range(1, wanted.steps + 1):
        inputs, targets = shifted(*mine, wanted.batch, draw, wanted.resolution)
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        schedule.step()
        if rank == 0 and (step % 50 == 0 or step == wanted.steps):
            right = accuracy(net, *test)
            handle.log(step=step, test_accuracy=right)
            print(f"step {step:4}  accuracy {right:.1%}", flush=True)

    if rank == 0:
        sent_bytes = handle.stats()["payload_bytes"] / wanted.steps
        print(f"{wanted.network}, {wanted.method}: each worker sent {sent_bytes:,.0f} bytes per step")
    handle.detach()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
