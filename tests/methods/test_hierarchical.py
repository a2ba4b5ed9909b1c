"""Nodes first, then between nodes: the same as the method between nodes on the nodes' means, and every byte
once."""

from __future__ import annotations

import pytest
import torch

from distcomp.collectives import AllReduce
from distcomp.errors import DistcompError
from distcomp.methods import ErrorFeedback, TwoLevel, identity, nodes_of, parse, two_level
from distcomp.randomness import Key
from tests.buffers import ORDINARY, draw
from tests.lockstep import SEED, Round, converse, once

NODES = {
    "2 of 2": ((0, 1), (2, 3)),
    "2 of 3": ((0, 1, 2), (3, 4, 5)),
    "3 of 2": ((0, 1), (2, 3), (4, 5)),
    "interleaved": ((0, 2), (1, 3)),
    "1 of 3": ((0, 1, 2),),
    "3 of 1": ((0,), (1,), (2,)),
}
ACROSS = {
    "sum": "identity",
    "narrow sum": "bf16",
    "two sums": "powersgd:rank=2",
    "all_gather": "qsgd:bits=4,pattern=all_gather",
    "swap and gather": "qsgd:bits=3,pattern=reduce_scatter",
    "gather of sparse payloads": "topk:ratio=0.05",
    "broadcast and sum": "cyclic_topk:ratio=0.05",
}
everywhere = pytest.mark.parametrize("nodes", NODES.values(), ids=NODES)
whatever = pytest.mark.parametrize("across", ACROSS.values(), ids=ACROSS)


def between(across: str, means: list[torch.Tensor], steps: int) -> list[torch.Tensor]:
    """What ``across`` comes to among workers that hold the nodes' means, with the keys it has between
    nodes."""
    method, count, found = parse(across), len(means), []
    states = [method.init(ORDINARY)] * count
    for step in range(steps):
        shared = Key.of(SEED, step).fold("across")
        round_ = converse(method, means, states, step=step, shared=shared)
        states = round_.states
        found.append(round_.estimate)
    return found


def rounds(method: TwoLevel, xs: list[torch.Tensor], steps: int) -> list[Round]:
    states, found = [method.init(ORDINARY)] * len(xs), []
    for step in range(steps):
        found.append(converse(method, xs, states, step=step))
        states = found[-1].states
    return found


@whatever
@everywhere
def test_it_is_the_method_between_nodes_on_the_means_of_nodes(nodes, across: str) -> None:
    xs = draw(sum(map(len, nodes)))
    means = [sum(xs[rank] * (1.0 / len(node)) for rank in node) for node in nodes]
    found = rounds(two_level(across=across, nodes=nodes), xs, steps=3)
    expected = between(across, means, 3) if len(nodes) > 1 else [means[0]] * 3
    for round_, estimate in zip(found, expected, strict=True):
        assert all(torch.equal(one, estimate) for one in round_.estimates)


@whatever
@everywhere
def test_contributions_sum_to_n_times_the_estimate_and_nodes_owe_alike(nodes, across: str) -> None:
    size = sum(map(len, nodes))
    method = TwoLevel(identity(), parse(across), nodes)
    for round_ in rounds(method, draw(size), steps=2):
        gap = sum(c.double() for c in round_.contributions()) - size * round_.estimate.double()
        largest = float(torch.stack(round_.contributions()).abs().sum(0).max())
        assert float(gap.abs().max()) <= largest * (1e-5 + size * round_.rounding)
    states = [state["across"] for state in round_.states]
    residuals = [state["usual"]["residual"].data for state in states if "residual" in state.get("usual", {})]
    for node in nodes if residuals and len(nodes) > 1 else ():
        assert all(torch.equal(residuals[rank], residuals[node[0]]) for rank in node)


@whatever
@everywhere
def test_bytes_are_those_declared(nodes, across: str) -> None:
    size = sum(map(len, nodes))
    method = TwoLevel(identity(), parse(across), nodes)
    for step, round_ in enumerate(rounds(method, draw(size), steps=2)):
        requests = len(round_.asked) // size
        declared = method.payload_bytes(ORDINARY, size, step)
        assert sum(round_.sent_bytes) / size == pytest.approx(declared, abs=4 + 2 * requests)


def test_bytes_are_those_declared_where_the_state_counts_the_phases() -> None:
    """Of a method between nodes that learns for five steps and compresses for three."""
    method = two_level(across="gradiveq:ratio=4,loss=0,learn=5,compressed=3", nodes=NODES["2 of 2"])
    declared = [method.payload_bytes(ORDINARY, 4, step) for step in range(8)]
    for step, round_ in enumerate(rounds(method, draw(4), steps=8)):
        assert sum(round_.sent_bytes) / 4 == pytest.approx(declared[step], abs=24), f"step {step}"
    assert len(set(declared)) > 2


def test_between_nodes_every_byte_goes_once_however_many_ranks_a_node_has() -> None:
    """Two nodes of two: together they send over the network what two workers alone would."""
    nodes, across = NODES["2 of 2"], "qsgd:bits=4,pattern=all_gather"
    columns = ((0, 2), (1, 3))
    round_ = once(TwoLevel(identity(), parse(across), nodes), draw(4))
    over = [request for request in round_.asked if request.group in columns]
    payloads = sum(request.payload.body.numel() for request in over if not isinstance(request, AllReduce))
    flat = once(parse(across), draw(2))
    alone = sum(request.payload.body.numel() for request in flat.asked if not isinstance(request, AllReduce))
    assert alone <= payloads <= alone + 2 * 8
    assert not any(request.group is None for request in round_.asked)


@everywhere
def test_two_exact_methods_are_the_exact_mean(nodes) -> None:
    size = sum(map(len, nodes))
    round_ = once(TwoLevel(identity(), identity(), nodes), draw(size))
    torch.testing.assert_close(round_.estimate, torch.stack(draw(size)).mean(0), atol=1e-6, rtol=1e-5)
    for contribution, x in zip(round_.contributions(), draw(size), strict=True):
        torch.testing.assert_close(contribution, x, atol=1e-6, rtol=1e-5)


def test_nodes_round_independently() -> None:
    """Two nodes with the same gradients: noise that they shared would not average out between them."""
    xs = draw(2) * 2
    method = two_level("(qsgd:bits=2,error_feedback=false)", "identity", NODES["2 of 2"])
    assert not torch.equal(once(method, xs).estimate, once(parse("qsgd:bits=2"), xs[:2]).estimate)
    contributions = once(method, xs).contributions()
    assert not torch.equal(contributions[0], contributions[2])


def test_error_feedback_around_it_loses_nothing() -> None:
    xs = draw(4)
    method = ErrorFeedback(TwoLevel(identity(), parse("qsgd:bits=1,error_feedback=false"), NODES["2 of 2"]))
    last = rounds(method, xs, 8)
    sent = sum(4 * round_.estimate.double() for round_ in last)
    residual = sum(state["residual"].data.double() for state in last[-1].states)
    torch.testing.assert_close(sent + residual, 8 * sum(x.double() for x in xs), atol=1e-4, rtol=1e-4)


def test_a_nan_on_one_rank_reaches_all() -> None:
    xs = draw(6)
    xs[4][100] = torch.nan
    round_ = once(two_level(across="qsgd:bits=2", nodes=NODES["3 of 2"]), xs)
    assert not any(round_.finite)
    assert all(estimate.isnan().all() for estimate in round_.estimates)


@pytest.mark.parametrize(
    ("told", "nodes"),
    [
        ({}, None),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, ((0, 1), (2, 3))),
        ({"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "3"}, ((0, 1, 2),)),
        ({"PMI_SIZE": "2", "MPI_LOCALNRANKS": "1"}, ((0,), (1,))),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, ((0, 1), (2, 3))),
        ({"WORLD_SIZE": "4"}, None),
    ],
)
def test_nodes_are_as_the_launcher_tells(
    told: dict[str, str], nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert nodes_of(told) == nodes
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert two_level().nodes == nodes


def test_a_config_string_says_all_of_it() -> None:
    text = "two_level:inside=bf16,across=(qsgd:bits=2,block=64),nodes=((0,1),(2,3))"
    assert parse(text) == TwoLevel(parse("bf16"), parse("qsgd:bits=2,block=64"), NODES["2 of 2"])


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(DistcompError, match="equal size"):
        two_level(nodes=((0, 1), (2,)))
    with pytest.raises(DistcompError, match="equal size"):
        two_level(nodes=((0, 1), (1, 2)))
    with pytest.raises(DistcompError, match="3 are here"):
        once(two_level(nodes=((0, 1), (2, 3))), draw(3))
    with pytest.raises(DistcompError, match="as many"):
        nodes_of({"WORLD_SIZE": "5", "LOCAL_WORLD_SIZE": "2"})
