"""What a tracker's own reader reads back is what was sent. scripts/test-trackers installs the libraries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="not installed; scripts/test-trackers installs it")
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    from distcomp.integrations.wandb import WandB

    for rank in (0, 1):
        follow(WandB(project="job", mode="offline", dir=str(tmp_path)), rank)
    found = {}
    for path in tmp_path.rglob("run-*.wandb"):
        store, rows, name = DataStore(), [], ""
        store.open_for_scan(str(path))
        while (data := store.scan_data()) is not None:
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
    found = {}
    for run in aim.Repo(str(tmp_path)).query_metrics("metric.name == 'distcomp/payload_bytes'").iter_runs():
        for metric in run:
            steps, values = metric.values.sparse_numpy()
            found[metric.context.to_dict()["rank"]] = list(zip(steps.tolist(), values.tolist(), strict=True))
    assert found == {rank: list(enumerate(SENT_BYTES[rank])) for rank in (0, 1)}
