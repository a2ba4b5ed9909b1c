"""What a tracker's own reader reads back is what was sent. scripts/test-trackers installs the libraries."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HEADER, BLOCK, WHOLE_OR_LAST = struct.Struct("<IHB"), 32768, (1, 4)
STEPS = 3
SENT_BYTES = {rank: [100 + 10 * rank + step for step in range(STEPS)] for rank in (0, 1)}


def records(rank: int) -> list[dict]:
    """What a handle would say: three steps and an evaluation."""
    steps = [
        {"kind": "step", "step": step, "step_s": 0.5, "exchange_s": 0.25, "phases": {"encode_s": 0.125},
         "payload_bytes": nbytes, "payload_by_kind": {"codes": nbytes}, "qdisc_bytes": None}
        for step, nbytes in enumerate(SENT_BYTES[rank])
    ]  # fmt: skip
    return [*steps, {"kind": "metric", "step": STEPS - 1, "test_loss": 0.25, "note": "text is no scalar"}]


def follow(sink, rank: int) -> None:
    sink.begin(rank, 2)
    for record in records(rank):
        sink(record)
    sink.close()


def leveldb_records(log: bytes, before: int) -> Iterator[bytes]:
    """The records of a LevelDB log whose first block has ``before`` bytes less: what W&B writes offline."""
    at, record = 0, b""
    while at + HEADER.size <= len(log):
        left = BLOCK - (at + before) % BLOCK
        if left < HEADER.size:
            at += left
            continue
        _, length, kind = HEADER.unpack_from(log, at)
        at += HEADER.size + length
        record += log[at - length : at]
        if kind in WHOLE_OR_LAST:
            yield record
            record = b""


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="not installed; scripts/test-trackers installs it")
    from wandb.proto.wandb_internal_pb2 import Record

    from distcomp.integrations.wandb import WandB

    for rank in (0, 1):
        follow(WandB(project="job", mode="offline", dir=str(tmp_path)), rank)
    found = {}
    for path in tmp_path.rglob("run-*.wandb"):
        rows, name = [], ""
        for data in leveldb_records(path.read_bytes()[7:], 7):
            record = Record()
            record.ParseFromString(data)
            name = record.run.display_name or name
            if record.HasField("history"):
                items = {one.key or "/".join(one.nested_key): one.value_json for one in record.history.item}
                rows.append({key: json.loads(value) for key, value in items.items()})
        found[name] = rows
    for rank in (0, 1):
        rows = found[f"rank{rank}"]
        sent = [one["distcomp/payload_bytes"] for one in rows if "distcomp/payload_bytes" in one]
        assert sent == SENT_BYTES[rank]
        assert [one["distcomp/step"] for one in rows] == [0, 1, 2, 2]
        assert [one["distcomp/test_loss"] for one in rows if "distcomp/test_loss" in one] == [0.25]


def test_mlflow(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="not installed; scripts/test-trackers installs it")
    from distcomp.integrations.mlflow import MLflow

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for rank in (0, 1):
        follow(MLflow(uri=uri), rank)
    client = mlflow.MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("distcomp").experiment_id])
    assert sorted(one.info.run_name for one in runs) == ["rank0", "rank1"]
    for run in runs:
        history = client.get_metric_history(run.info.run_id, "distcomp/payload_bytes")
        rank = int(run.info.run_name[-1])
        assert [(one.step, one.value) for one in history] == list(enumerate(SENT_BYTES[rank]))
        assert client.get_metric_history(run.info.run_id, "distcomp/test_loss")[0].value == 0.25
        assert run.info.status == "FINISHED"


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip("trackio", reason="not installed; scripts/test-trackers installs it")
    from trackio.sqlite_storage import SQLiteStorage

    from distcomp.integrations.trackio import Trackio

    for rank in (0, 1):
        follow(Trackio("job"), rank)
    for rank in (0, 1):
        rows = SQLiteStorage.get_logs("job", f"run-rank{rank}")
        sent = [one["distcomp/payload_bytes"] for one in rows if "distcomp/payload_bytes" in one]
        assert sent == SENT_BYTES[rank]
        assert [one["distcomp/test_loss"] for one in rows if "distcomp/test_loss" in one] == [0.25]


def test_aim(tmp_path: Path) -> None:
    aim = pytest.importorskip("aim", reason="not installed; scripts/test-trackers installs it")
    from distcomp.integrations.aim import Aim

    for rank in (0, 1):
        follow(Aim(tmp_path), rank)
    # ``aim up`` does this beside; without an index its reader finds no run.
    program = str(Path(sys.executable).with_name("aim"))
    reindex = [program, "storage", "--repo", str(tmp_path), "reindex", "-y"]
    subprocess.run(reindex, check=True, capture_output=True, timeout=120)
    found = {}
    for run in aim.Repo(str(tmp_path)).query_metrics("metric.name == 'distcomp/payload_bytes'").iter_runs():
        for metric in run:
            _, values = metric.values.sparse_numpy()  # steps are hashed there
            found[metric.context.to_dict()["rank"]] = sorted(values.tolist())
    assert found == SENT_BYTES
