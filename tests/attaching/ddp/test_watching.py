"""Ranges in the profiler's trace; records to sinks, to TensorBoard and to Prometheus."""

import math
import re

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from distcomp.runtime import pipeline
from tests.attaching.ddp import jobs

STEPS = 3


def traced(rank, size, spec):
    """(how often each range came, buckets per step), with every thread in the trace."""
    everybody = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    model, optimizer, handle = jobs.attached(spec, rank)
    buckets = []
    with handle:
        jobs.train(model, optimizer, rank, 2)  # DDP settles on its buckets in the first step
        hook = handle._sync.hook
        handle._sync.hook = lambda bucket: buckets.append(bucket.index()) or hook(bucket)
        with profile(activities=[ProfilerActivity.CPU], experimental_config=everybody) as profiler:
            jobs.train(model, optimizer, rank, STEPS, start=2)
    counts = {}
    for event in profiler.events():
        if event.name.startswith("distcomp::"):
            counts[event.name] = counts.get(event.name, 0) + 1
    return counts, len(buckets)


@pytest.mark.parametrize(
    ("spec", "title", "rounds"),
    [("qsgd:bits=4,pattern=all_gather", "qsgd:pattern=all_gather", 1),
     ("powersgd:min_compression=0", "powersgd:min_compression=0", 2)],
)  # fmt: skip
def test_every_bucket_has_its_ranges(cluster, spec, title, rounds):
    for counts, buckets in cluster(2).run(traced, spec):
        assert buckets > STEPS
        encoded, waited, decoded = (
            counts[f"distcomp::{title}::{one}"] for one in ("encode", "wait", "decode")
        )
        assert encoded == buckets
        assert buckets <= waited == decoded <= rounds * buckets
        assert (waited > buckets) == (rounds > 1)
        assert len(counts) == 3


def untraced(rank, size):
    def never(*_):
        raise AssertionError("a range was opened, and no profiler runs")

    kept, pipeline.record_function = pipeline.record_function, never
    try:
        model, optimizer, handle = jobs.attached("qsgd:bits=4", rank)
        with handle:
            jobs.train(model, optimizer, rank, 2)
    finally:
        pipeline.record_function = kept


def test_without_a_profiler_there_are_none(cluster):
    cluster(2).run(untraced)


def watched(rank, size, sink_of, directory):
    """Train with a sink, and log once; what the handle counted."""
    model, optimizer, handle = jobs.attached("qsgd:bits=4", rank)
    handle.watch(sink_of(rank, directory))
    jobs.train(model, optimizer, rank, STEPS)
    handle.log(step=STEPS, test_loss=0.25, note="text is no scalar")
    stats = handle.stats()
    handle.detach()
    return stats


class Kept:
    def __init__(self, rank, directory):
        self.path = directory / f"{rank}.pt"
        self.records = []

    def __call__(self, record):
        self.records.append(dict(record))

    def close(self):
        torch.save(self.records, self.path)


def test_a_sink_gets_every_step_and_is_closed(cluster, tmp_path):
    stats = cluster(2).run(watched, Kept, tmp_path)
    for rank, stat in enumerate(stats):
        *steps, metric = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert [(one["kind"], one["step"]) for one in steps] == [("step", index) for index in range(STEPS)]
        for kind, sent_bytes in stat["payload_by_kind"].items():
            assert sum(one["payload_by_kind"][kind] for one in steps) == sent_bytes
        trained_s = metric.pop("train_s")
        assert trained_s >= sum(one["step_s"] for one in steps) > 0
        assert sum(one["payload_bytes"] for one in steps) == stat["payload_bytes"]
        assert metric == {"kind": "metric", "step": STEPS, "test_loss": 0.25, "note": "text is no scalar"}


def board(rank, directory):
    from distcomp.integrations.tensorboard import TensorBoard

    return TensorBoard(directory)  # the same words on every rank, as in a script


def test_tensorboard_reads_what_was_sent(cluster, tmp_path):
    pytest.importorskip("tensorboard", reason="not installed; pip install 'distcomp[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stats = cluster(2).run(watched, board, tmp_path)
    for rank, stat in enumerate(stats):
        read = EventAccumulator(str(tmp_path / f"rank{rank}")).Reload()
        assert {"distcomp/step_s", "distcomp/phases/encode_s"} <= set(read.Tags()["scalars"])
        sent = read.Scalars("distcomp/payload_bytes")
        assert [one.step for one in sent] == list(range(STEPS))
        assert sum(one.value for one in sent) == stat["payload_bytes"]
        assert [one.value for one in read.Scalars("distcomp/test_loss")] == [0.25]


def prometheus(rank, directory):
    from distcomp.integrations.prometheus import Prometheus

    return Prometheus(directory / "job.prom", every_s=math.inf)  # the same words on every rank


def test_prometheus_reads_what_was_sent(cluster, tmp_path):
    parser = pytest.importorskip(
        "prometheus_client.parser", reason="not installed; pip install 'distcomp[prometheus]'"
    )
    stats = cluster(2).run(watched, prometheus, tmp_path)
    for rank, stat in enumerate(stats):
        families = parser.text_string_to_metric_families((tmp_path / f"job-rank{rank}.prom").read_text())
        families = list(families)
        assert {family.name: family.type for family in families}["distcomp_sent_bytes"] == "counter"
        found = {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}
        mine = ("rank", str(rank))
        assert found["distcomp_steps_total", mine] == STEPS
        assert found["distcomp_metric", ("name", "test_loss"), mine] == 0.25
        for kind, sent_bytes in stat["payload_by_kind"].items():
            assert found["distcomp_sent_bytes_total", ("kind", kind), mine] == sent_bytes
        assert found["distcomp_seconds_total", ("phase", "encode"), mine] > 0
        assert all(re.match("distcomp_", name) for name, *_ in found)
