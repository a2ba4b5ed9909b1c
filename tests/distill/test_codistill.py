"""Codistillation on real processes: what is sent, what it pulls towards, who may be lost, and resume."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import distcomp
from distcomp.averaging import codistill
from distcomp.averaging.base import AveragingContext, _Within
from distcomp.averaging.codistill import Codistillation, predictions_layout
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.randomness import Key
from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.driver import in_lock_step
from distcomp.runtime.lockstep import Lockstep
from tests.distill import codistill_jobs as jobs
from tests.distill.oracles import softmax

ROWS, CLASSES = 6, 5
LAYOUT = Layout.of([("predictions", (ROWS, CLASSES))])


def exchanged(method, values, absent=frozenset(), states=None):
    """Every worker's result of one exchange."""
    net = Lockstep(len(values))
    contexts = [
        AveragingContext(r, len(values), LAYOUT, 0, Key.of(1), absent=absent) for r in range(len(values))
    ]
    states = states or [method.init(x, c) for x, c in zip(values, contexts, strict=True)]
    runs = [
        Aggregation(_Within(method, None), x, s, c) for x, s, c in zip(values, states, contexts, strict=True)
    ]
    return in_lock_step(net, runs), net


def drawn(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(ROWS * CLASSES, generator=draw) for _ in range(count)]


@pytest.mark.parametrize("T", [1.0, 3.0])
def test_targets_are_the_mean_of_the_others_probabilities(T):
    """Anil et al., 2018, section 2.1: the average of the others' predictions, one's own left out."""
    values = drawn(3)
    results, net = exchanged(Codistillation(temperature=T), values)
    for rank, result in enumerate(results):
        others = [softmax(v.numpy().reshape(ROWS, CLASSES), T) for j, v in enumerate(values) if j != rank]
        assert np.allclose(result.state["targets"].data.numpy(), np.mean(others, 0).ravel(), atol=1e-6)
        assert result.state["heard"]["predictions"].item() == 2
    assert [ledger.total_bytes for ledger in net.ledgers] == [2 * (4 * ROWS * CLASSES + 32)] * 3


def test_numbers_are_averaged_as_they_are():
    values = drawn(3)
    results, _ = exchanged(Codistillation(term="mse"), values)
    assert torch.allclose(results[0].state["targets"].data, (values[1] + values[2]) / 2)


def test_whoever_is_lost_is_left_out_and_what_it_said_stays_where_nobody_answers():
    values = drawn(3)
    method = Codistillation(on_failure="continue")
    first, _ = exchanged(method, values)
    again, _ = exchanged(method, values, frozenset({0, 1, 2}), [one.state for one in first])
    assert torch.equal(again[0].state["targets"].data, first[0].state["targets"].data)
    alone, _ = exchanged(method, values, frozenset({0, 1, 2}))
    assert alone[0].state["heard"]["predictions"].item() == 0


def test_copies_of_checkpoints_are_the_senders_bit_for_bit():
    method = codistill(values="qsgd:bits=4", exchanged="checkpoints")
    values, states = drawn(3), None
    for _ in range(6):
        results, _ = exchanged(method, values, states=states)
        states = [result.state for result in results]
    for rank in range(3):
        for j, replica in states[rank]["replicas"].items():
            assert torch.equal(replica.data, states[int(j)]["public"].data)
            assert torch.allclose(replica.data, values[int(j)], atol=0.01)  # differences shrink
    assert torch.equal(results[1].estimate, values[1])


def test_a_ring_hears_two_of_five():
    values = drawn(5)
    results, _ = exchanged(Codistillation(topology="ring", term="mse"), values)
    assert torch.allclose(results[0].state["targets"].data, (values[1] + values[4]) / 2)
    assert Codistillation(topology="ring").conditions(LAYOUT, 5)["degree"] == 2
    assert Codistillation().conditions(LAYOUT, 5)["degree"] == 4


def test_rows_are_drawn_anew_and_alike():
    method = Codistillation(rows=4, batch=3)
    first, second = (method.exchanged_rows(10, step, 7) for step in (50, 100))
    assert len(first) == 4
    assert not torch.equal(first, second)
    assert torch.equal(first, method.exchanged_rows(10, 50, 7))
    mine, theirs = (method.batch_rows(10, 51, 7, rank) for rank in (0, 1))
    assert len(mine) == 3
    assert not torch.equal(mine, theirs)


def test_it_is_a_method_like_others():
    method = distcomp.parse("codistill:period=20,values=(qsgd:bits=4),weight=0 ~> 1 @ 100,rows=32")
    assert str(method) == "codistill:period=20,values=qsgd,weight=(0 ~> 1 @ 100),rows=32" or "rows=32" in str(
        method
    )
    assert distcomp.parse(str(method)) == method
    assert method.weight_at(50) == 0.5
    from distcomp.registry import METHODS

    assert METHODS["codistill"].kind == "predictions"


def test_replicas_learn_each_others_predictions_and_bytes_do_not_depend_on_the_model(cluster):
    text = "codistill:period=3,values=identity,batch=20,weight=2"
    pulled = cluster(2).run(jobs.run, text)
    alone = cluster(2).run(jobs.run, "codistill:period=3,values=identity,weight=0")
    wide = cluster(2).run(jobs.run, text, 64)
    for found, other, large in zip(pulled, alone, wide, strict=True):
        assert found["apart"] < 0.8 * other["apart"]
        assert found["stats"]["payload_bytes"] == large["stats"]["payload_bytes"] == 2 * (4 * 20 * 4 + 32)
        assert found["stats"]["exchanges"] == 2
        assert found["stats"]["heard"] == 1
        assert found["stats"]["disagreement"] > 0
    assert not torch.equal(pulled[0]["weights"], pulled[1]["weights"])


def test_networks_may_differ(cluster):
    found = cluster(2).run(jobs.widths, "codistill:period=2,values=(qsgd:bits=8)")
    assert found[0]["weights"].numel() != found[1]["weights"].numel()
    assert all(one["stats"]["heard"] == 1 for one in found)


def test_the_gradient_is_that_of_the_weighted_sum(cluster):
    for scale in (1.0, 256.0):
        for seen, wanted in cluster(2).run(jobs.clipped, scale):
            assert torch.allclose(seen, wanted, atol=1e-6)


@pytest.mark.parametrize(
    "text", ["codistill:period=2,rows=10,batch=4", "codistill:period=3,exchanged=checkpoints"]
)
def test_resume_is_bit_equal(cluster, text):
    for whole, again in cluster(2).run(jobs.resumed, text):
        assert torch.equal(whole, again)


def test_under_ddp_nothing_else_is_sent(cluster):
    found = cluster(2).run(jobs.run, "codistill:period=3,values=identity,weight=2", 8, True)
    assert all(one["stats"]["payload_bytes"] == 2 * (4 * 20 * 4 + 32) for one in found)
    assert not torch.equal(found[0]["weights"], found[1]["weights"])
    plain = cluster(2).run(jobs.run, "codistill:period=3,values=identity,weight=0", 8, True)
    assert not torch.equal(found[0]["weights"], plain[0]["weights"])  # DDP did not write over the term


def test_a_worker_that_dies_is_left_out(cluster):
    found = cluster(3).results(jobs.dies, 1, without=None)
    cluster(3).close()
    for rank in (0, 2):
        assert found[rank]["finite"]
        assert found[rank]["stats"]["lost"] == [1]
        assert found[rank]["stats"]["heard"] == 1
        assert found[rank]["stats"]["iterations"] == 10


@pytest.mark.parametrize("exchanged", ["predictions", "checkpoints"])
def test_a_worker_that_was_given_up_comes_back_with_its_own_network(exchanged, cluster):
    found = cluster(3).run(jobs.returns, f"codistill:period=1,exchanged={exchanged},on_failure=continue")
    late = found[2]
    for one in found[:2]:
        assert one["lost"] == [2]
        assert one["said"][-1] == "rank 2 is back; training goes on with it"
    taken_in = " ".join(late["said"])
    assert "rank 2 was given up by its neighbours and is taken in again by rank" in taken_in
    assert "with the model of" not in taken_in
    assert late["iterations"] == found[0]["iterations"] > late["steps"]
    for one in found:
        assert (one["heard"], one["left out"], one["threads"]) == (2, [], [])
        assert torch.isfinite(one["weights"]).all()
        assert len(one["replicas"]) == (2 if exchanged == "checkpoints" else 0)
        for neighbour, replica in one["replicas"].items():
            assert torch.equal(replica, found[neighbour]["public"])
    assert not torch.equal(found[0]["weights"], late["weights"])


def test_what_cannot_be_is_refused(cluster):
    for told in cluster(2).run(jobs.refusals):
        words = [
            "shared=examples",
            "21 rows",
            "list",
            "shared examples",
            "predictions",
            "parameters",
            "[rows",
            "nothing",
        ]
        assert len(told) == len(words)
        for sentence, word in zip(told, words, strict=True):
            assert word in sentence


def test_networks_have_no_mean_on_another_world_size(cluster):
    assert all("which is its worker's own" in told for told in cluster(2).run(jobs.other_world))


def test_all_workers_may_have_the_mean_of_what_all_predict(cluster):
    (first, mean), (second, other) = cluster(2).run(jobs.shared_mean)
    assert torch.equal(mean, other)
    assert torch.allclose(mean, (first + second) / 2, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"term": "l1"},
        {"exchanged": "gradients"},
        {"temperature": 0.0},
        {"batch": 0},
        {"weight": -1},
        {"rows": -1},
    ],
)
def test_settings_outside_their_ranges_are_refused(settings):
    with pytest.raises(DistcompError, match="codistill"):
        codistill(**settings)


def test_outputs_that_are_no_rows_are_refused():
    with pytest.raises(DistcompError, match="rows"):
        predictions_layout(3, torch.zeros(1))


def task(workers_see_little: bool = True):
    """Workers of few labels and shared rows without any."""
    import torch.nn.functional as F

    from distcomp.advice import TrainingTask
    from tests.distill.networks import mlp, rows

    def batch(worker, workers, step):
        return rows(8, seed=worker)

    return TrainingTask(
        model=mlp(8),
        batch=batch,
        loss=F.cross_entropy,
        optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
        evaluate=lambda model: {
            "test_loss": F.cross_entropy(model(rows(50, seed=5)[0]), rows(50, seed=5)[1]).item()
        },
        shared=jobs.SHARED,
    )


def test_it_is_simulated_as_it_runs(cluster):
    """The simulated workers hold the same exchanges and add the same gradients as real ranks."""
    from distcomp.advice import Setting, Simulation
    from distcomp.network import Fabric

    text = "codistill:period=2,values=(qsgd:bits=8),rows=10,batch=4,weight=2"
    simulation = Simulation(task(), distcomp.parse(text), Setting(Fabric.uniform(2, "1mbit"), seed=5))
    for _ in range(7):
        simulation.step()
    found = cluster(2).run(jobs.as_simulated, text)
    for rank, (weights, sent_bytes) in enumerate(found):
        assert torch.allclose(simulation.models[rank], weights, atol=1e-5)
        assert simulation.sent_bytes == sent_bytes
    evaluated = simulation.evaluate()
    assert evaluated["seconds"] > 3 * 8 * sent_bytes / 3 / 1e6
    assert evaluated["spread"] > 0


def test_it_is_advised_about():
    from distcomp.advice import profile_method
    from distcomp.advice.advise import advise
    from distcomp.network import Fabric

    text = "codistill:period=10,values=identity"
    advice = advise(task(), Fabric.uniform(2, "1mbit"), ("ddp", text))
    (row,) = [row for row in advice.rows if row.method == text]
    assert row.prediction.sent_bytes == pytest.approx((4 * 20 * 4 + 32) / 10)
    with pytest.raises(DistcompError, match="shared=examples"):
        profile_method(text, [LAYOUT], 2)


def test_a_task_without_shared_examples_is_not_simulated():
    from dataclasses import replace

    from distcomp.advice import Setting, Simulation
    from distcomp.network import Fabric

    with pytest.raises(DistcompError, match="shared=examples"):
        Simulation(replace(task(), shared=None), codistill(), Setting(Fabric.uniform(2, "1mbit")))
