"""The audit names every collective of a step, what it sends, and what could be less."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from distcomp.attaching.audit_report import Audit, sent_in_call_bytes
from tests.attaching import audit_jobs as jobs
from tests.attaching.audit_jobs import WIDTH

MATRIX = 4 * WIDTH * WIDTH
"""Bytes of each of the two matrices."""


def test_ddp_is_one_sum_of_gradients(cluster):
    for found in cluster(2).run(jobs.audited, "ddp"):
        (row,) = found["rows"]
        assert found["steps"] == 3
        assert (row["role"], row["kind"], row["dtype"], row["ranks"]) == (
            "gradients",
            "all_reduce",
            "float32",
            2,
        )
        assert row["bytes"] == pytest.approx(2 * MATRIX)  # 2 (n-1)/n of both matrices
        assert found["sentence"] == "100 % of the bytes of a step are gradient reductions in float32"
        assert found["interface_bytes"] is None


@pytest.mark.parametrize("size", [2, 4])
def test_fsdp_gathers_weights_and_scatters_gradients_module_by_module(cluster, size):
    """Gathers before the forward and the backward; Gloo's reduce-scatter sends as much as its all-reduce."""
    for found in cluster(size).run(jobs.audited, "fsdp"):
        by = {(row["role"], row["module"]): row for row in found["rows"]}
        assert set(by) == {(role, module) for role in ("weights", "gradients") for module in ("0", "1")}
        share = (size - 1) / size
        for module in ("0", "1"):
            assert by["weights", module]["calls"] == 2
            assert by["weights", module]["bytes"] == pytest.approx(2 * share * MATRIX)
            assert by["gradients", module]["bytes"] == pytest.approx(2 * share * MATRIX)


def test_hsdp_sums_over_replicas_too(cluster):
    for found in cluster(4).run(jobs.audited, "hsdp"):
        kinds = {(row["role"], row["kind"]) for row in found["rows"]}
        assert kinds == {
            ("weights", "all_gather"),
            ("gradients", "reduce_scatter"),
            ("gradients", "all_reduce"),
        }
        across = sum(row["bytes"] for row in found["rows"] if row["kind"] == "all_reduce")
        assert across == pytest.approx(2 * MATRIX / 2)  # both matrices' shards of two, 2 (n-1)/n each
        assert all(row["ranks"] == 2 for row in found["rows"])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_compiled_layers_are_audited_as_they_are_written(cluster, kind):
    for asked, plain in cluster(2).run(jobs.compiled, kind):
        assert asked["rows"] == plain["rows"]
        assert asked["steps"] == 3


def test_a_collective_within_a_graph_is_seen(cluster):
    for found, compiled_again in cluster(2).run(jobs.in_a_graph):
        (row,) = found["rows"]
        assert (row["kind"], row["bytes"]) == ("all_reduce", 32)
        assert compiled_again


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("weights", ["qsgd:bits=8", "difference:compressor=(qsgd:bits=4)"])
def test_what_a_setting_would_save_is_what_it_saves(cluster, size, weights):
    plain, *_ = cluster(size).run(jobs.audited, "fsdp")
    (predicted,) = [
        one["bytes"]
        for one in plain["savings"]
        if (one["method"], one["weights"]) == ("qsgd:bits=4", weights)
    ]
    for found in cluster(size).run(jobs.audited, "fsdp", ("qsgd:bits=4", weights)):
        assert {row["dtype"] for row in found["rows"]} == {"packed"}
        assert {row["role"] for row in found["rows"]} == {"weights", "distcomp"}
        assert found["sent_bytes"] / 3 == pytest.approx(predicted, rel=0.03, abs=150)
        assert predicted < 0.4 * plain["sent_bytes"] / 3


@pytest.mark.parametrize("wide", [False, True])
def test_a_gather_in_a_wider_type_than_was_asked_for_is_named(cluster, wide):
    for found in cluster(2).run(jobs.gathered_wide, wide):
        types = {row["module"]: row["dtype"] for row in found["rows"] if row["role"] == "weights"}
        assert types == {"0": "float32" if wide else "bfloat16", "1": "bfloat16"}
        assert len(found["warnings"]) == wide
        if wide:
            assert (
                "0 runs its weight gathers in float32, and bfloat16 was asked for: 2 times" in found["text"]
            )


def test_the_scripts_own_collectives_are_seen(cluster):
    for found in cluster(2).run(jobs.other_collectives):
        rows = sorted((row["kind"], row["role"], row["bytes"]) for row in found["rows"])
        assert rows == [("all_gather", "other", 64), ("all_reduce", "other", 40), ("all_reduce", "other", 80)]


@pytest.mark.parametrize(
    ("kind", "gloo", "nccl"),
    [
        ("all_reduce", 150, 150),
        ("all_gather", 300, 300),
        ("reduce_scatter", 150, 75),
        ("all_to_all", 75, 75),
        ("send", 100, 100),
    ],
)
def test_formulas_of_what_is_sent(kind, gloo, nccl):
    assert sent_in_call_bytes(kind, 100, 4, "gloo") == gloo
    assert sent_in_call_bytes(kind, 100, 4, "nccl") == nccl
    assert sent_in_call_bytes(kind, 100, 1, "gloo") == (100 if kind == "send" else 0)


def test_nothing_is_a_sentence_too():
    assert Audit().sentence == "no bytes were sent"
    assert Audit().savings() == {}


SCRIPT = """
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(64, 64, bias=False))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
print("hello from the script")
for _ in range({steps}):
    optimizer.zero_grad()
    model(torch.randn(4, 64)).sum().backward()
    optimizer.step()
"""


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "0"),
    ):
        monkeypatch.setenv(name, value)


def test_the_command_audits_a_rank_and_stops_it(alone, tmp_path: Path, capsys):
    from distcomp.cli import main

    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(steps=1000))
    path = list(sys.path)
    assert main(["audit", "--steps", "3", "--json", str(script)]) == 0
    answer = capsys.readouterr()
    found = json.loads(answer.out)
    assert found["steps"] == 3
    assert found["rows"][0]["kind"] == "all_reduce"
    assert found["rows"][0]["calls"] == 1
    assert "hello from the script" in answer.err
    assert sys.path == path


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (SCRIPT.format(steps=3), "took 3 steps with an optimizer, and 4 are needed"),
        ("1 / 0", "failed after 0"),
    ],
)
def test_a_script_that_cannot_be_audited_is_a_sentence(alone, tmp_path: Path, capsys, text, sentence):
    from distcomp.cli import main

    script = tmp_path / "train.py"
    script.write_text(text)
    assert main(["audit", str(script)]) == 2
    assert sentence in capsys.readouterr().err
    assert not torch.distributed.is_initialized()
