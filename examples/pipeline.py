"""A pipeline whose stages send each other activations and gradients in few bits.

The byte-level language model of bytes_lm.py, cut into as many stages as there are processes, by
``torch.distributed.pipelining`` as it is. Start it so::

    torchrun --nproc-per-node 2 examples/pipeline.py --codec qsgd:bits=8
    torchrun --nproc-per-node 2 examples/pipeline.py --codec none           # float32, to compare
"""

import argparse
import json

import torch
import torch.distributed as dist
from bytes_lm import (
    BYTES,
    CONTEXT,
    TEST_TEXTS,
    WIDTH,
    Reader,
    evaluate,
    loss_of,
    modules,
    texts,
    warm_up_then_cosine,
)
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.optim.lr_scheduler import LambdaLR

import distcomp
from distcomp.calls import PackedStage, StageEdge

MICROBATCHES = 4


def options(arguments=None):
    shown = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=shown)
    parser.add_argument("--codec", default="qsgd:bits=8", help="of activations; none for float32")
    parser.add_argument("--backward", help="codec of gradients; that of the activations by default")
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--batch", type=int, default=8, help="texts per step")
    parser.add_argument("--lr", type=float, default=4e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    return parser.parse_args(arguments)


class Beginning(nn.Module):
    """What the model does to the text before its blocks."""

    def __init__(self, model):
        super().__init__()
        self.bytes, self.places = model.bytes, model.places

    def forward(self, text):
        return self.bytes(text) + self.places.weight


def cut(model, count):
    """The model as ``count`` stages of as many blocks each as can be."""
    blocks = list(model.blocks)
    size = -(-len(blocks) // count)
    stages = [blocks[begin : begin + size] for begin in range(0, size * count, size)]
    stages[0].insert(0, Beginning(model))
    stages[-1].append(model.out)
    return [nn.Sequential(*stage) for stage in stages]


def train(wanted):
    """Train, and test on the last rank; what came of it, there."""
    rank, count = dist.get_rank(), dist.get_world_size()
    library = modules()
    held_out = torch.cat(library[::10])
    del library[::10]
    source = torch.cat(library)
    draw = torch.Generator().manual_seed(wanted.seed)

    torch.manual_seed(wanted.seed)
    model = Reader()  # the whole of it, of which this rank trains its stage
    stages = cut(model, count)
    shape = (wanted.batch // MICROBATCHES, CONTEXT, WIDTH)
    packs = wanted.codec != "none"

    def edge(place):
        return (
            StageEdge(shape, wanted.codec, wanted.backward, seed=place)
            if packs and 0 < place < count
            else None
        )

    before, after = edge(rank), edge(rank + 1)
    submodule = PackedStage(stages[rank], receives=before, sends=after)
    text = torch.zeros(shape[0], CONTEXT, dtype=torch.int64)
    plain = torch.zeros(shape, requires_grad=True)
    scores = torch.zeros(*shape[:2], BYTES, requires_grad=True)
    taken = text if rank == 0 else before.example() if packs else plain
    given = scores if rank == count - 1 else after.example() if packs else plain
    stage = PipelineStage(submodule, rank, count, torch.device("cpu"), input_args=taken, output_args=given)
    schedule = ScheduleGPipe(stage, MICROBATCHES, loss_fn=loss_of)
    optimizer = torch.optim.AdamW(stages[rank].parameters(), wanted.lr, betas=(0.9, 0.95))
    rate = LambdaLR(optimizer, lambda step: warm_up_then_cosine(step, wanted.steps))

    for step in range(1, wanted.steps + 1):
        text, following = texts(source, wanted.batch, draw)
        optimizer.zero_grad()
        arguments = [text] if rank == 0 else []
        losses = []
        schedule.step(*arguments, **({"target": following, "losses": losses} if rank == count - 1 else {}))
        optimizer.step()
        rate.step()
        if rank == count - 1 and step % 20 == 0:
            print(f"step {step:4}  loss {torch.stack(losses).mean():.3f}", flush=True)

    for place, part in enumerate(stages):  # the whole model everywhere, to test it
        for parameter in part.parameters():
            dist.broadcast(parameter.data, place)
    if rank == count - 1:
        test = texts(held_out, TEST_TEXTS, torch.Generator().manual_seed(0))
        loss, accuracy = evaluate(model, *test)
        plain = 4 * shape[0] * CONTEXT * WIDTH
        sent = 4 * before.wire_elements if before else plain
        return {
            "test_loss": loss,
            "test_accuracy": accuracy,
            "bytes_per_microbatch": sent,
            "float32_bytes": plain,
        }
    return None


def main():
    wanted = options()
    distcomp.init_process_group()
    result = train(wanted)
    if result is not None:
        print(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
