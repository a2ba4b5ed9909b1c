"""Stages that send each other payloads: the codec's rounding both ways, and real pipelines."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from distcomp import DistcompError
from distcomp.calls import PackedStage, StageEdge
from distcomp.errors import CorruptPayload

SHAPE = (4, 16)


def chained(edges_codec, backward=None):
    torch.manual_seed(0)
    one, two = nn.Linear(8, 16), nn.Linear(16, 3)
    here, there = (StageEdge(SHAPE, edges_codec, backward) for _ in range(2))  # one on each rank
    return one, two, PackedStage(one, sends=here), PackedStage(two, receives=there), here, there


def test_identity_gives_the_gradients_of_the_whole_net():
    one, two, first, second, *_ = chained("identity")
    x = torch.randn(4, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(two(one(x)).square().sum(), x)
    wire = first(x)
    sent = wire.detach().clone().requires_grad_()  # what arrives
    second(sent).square().sum().backward()
    wire.backward(sent.grad)
    assert x.grad.equal(expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_both_directions_are_the_codecs_own(bits):
    one, two, first, second, here, there = chained(f"quantize:bits={bits}")
    x = torch.randn(4, 8)
    wire = first(x)
    assert (
        wire.numel() * 4
        == here.sent_bytes
        == here.wire_elements * 4
        < 4 * 16 * 4 * (0.5 if bits == 8 else 0.4)
    )
    sent = wire.detach().clone().requires_grad_()
    second(sent).square().sum().backward()
    one(x)  # the same bits again
    activation = here.unpacked(wire, backward=False).requires_grad_()
    scale = one(x).abs().amax()
    assert (activation - one(x)).abs().max() <= scale / (2 ** (bits - 1) - 1)
    (gradient,) = torch.autograd.grad(two(activation).square().sum(), activation)
    one.zero_grad()
    wire.backward(sent.grad)
    rounded = here.unpacked(sent.grad, backward=True)
    assert (rounded - gradient).abs().max() <= gradient.abs().amax() / (2 ** (bits - 1) - 1)
    expected = rounded.t() @ x
    assert torch.allclose(one.weight.grad, expected, atol=1e-5)
    assert there.sent_bytes == here.sent_bytes


def test_gradients_are_unbiased():
    edge = StageEdge((1000,), "qsgd:bits=2")
    x = torch.linspace(-1, 1, 1000)
    mean = sum(edge.unpacked(edge.packed(x, True), True) for _ in range(400)) / 400
    assert (mean - x).abs().max() < 5 * 0.5 / math.sqrt(400) + 0.05


def test_what_is_not_finite_arrives_as_such():
    edge = StageEdge((4, 8), "quantize:bits=8")
    x = torch.ones(4, 8)
    x[1, 2] = math.inf
    assert edge.unpacked(edge.packed(x, False), False).isnan().all()


def test_altered_bytes_and_other_shapes_are_refused():
    edge = StageEdge((4, 8), "quantize:bits=8")
    wire = edge.packed(torch.ones(4, 8), False)
    altered = wire.clone()
    altered.view(torch.uint8)[40] ^= 1
    with pytest.raises(CorruptPayload, match="checksum"):
        edge.unpacked(altered, False)
    with pytest.raises(CorruptPayload):
        edge.unpacked(wire, True)  # an activation is no gradient
    with pytest.raises(CorruptPayload, match="declare the same edge on both stages"):
        edge.unpacked(wire[:-1], False)
    with pytest.raises(DistcompError, match="declare the shape of one microbatch"):
        edge.packed(torch.ones(4, 9), False)


def pipeline(rank, size, codec, schedule_name):
    """The gradients of two stages after a step of a real pipeline, and the losses."""
    from torch.distributed import pipelining

    torch.manual_seed(0)
    parts = [nn.Linear(8, 16), nn.Linear(16, 3)]
    x, y = torch.randn(8, 8), torch.randn(8, 3)
    edge = StageEdge((2, 16), codec)
    ends = {"sends": edge} if rank == 0 else {"receives": edge}
    last = torch.zeros(2, 3, requires_grad=True)
    taken, given = (torch.zeros(2, 8), edge.example()) if rank == 0 else (edge.example(), last)
    stage = pipelining.PipelineStage(
        PackedStage(parts[rank], **ends), rank, size, torch.device("cpu"), input_args=taken, output_args=given
    )
    schedule = getattr(pipelining, schedule_name)(stage, 4, loss_fn=nn.functional.mse_loss)
    if rank == 0:
        schedule.step(x)
    else:
        schedule.step(target=y)
    return parts[rank].weight.grad, edge.sent_bytes


@pytest.mark.parametrize("schedule", ["ScheduleGPipe", "Schedule1F1B"])
def test_torchs_own_pipelines_carry_it(cluster, schedule):
    torch.manual_seed(0)
    parts = [nn.Linear(8, 16), nn.Linear(16, 3)]
    x, y = torch.randn(8, 8), torch.randn(8, 3)
    nn.functional.mse_loss(parts[1](parts[0](x)), y).backward()
    for codec, bound in [("identity", 1e-6), ("qsgd:bits=8", 0.05)]:
        answers = cluster(2).run(pipeline, codec, schedule)
        for part, (gradient, sent_bytes) in zip(parts, answers, strict=True):
            assert (gradient - part.weight.grad).abs().max() < bound * part.weight.grad.abs().max()
            assert sent_bytes == 4 * 4 * StageEdge((2, 16), codec).wire_elements
