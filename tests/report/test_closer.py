"""What a closer look at steps records, and what the page makes of it; curves averaged over seeds."""

from __future__ import annotations

import csv
import html as escapes
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distcomp
from distcomp import recording
from distcomp.attaching.details import cadence
from distcomp.errors import DistcompError
from distcomp.report import compare, page
from distcomp.report.charts import Prices
from distcomp.report.series import MOST, averaged, interpolated, thinned
from tests.attaching.ddp import jobs
from tests.cluster import Cluster
from tests.report import synthetic
from tests.report.test_page import read


def looked_at(rank: int, size: int, where: str, every: str) -> dict[str, Any]:
    """Some steps with a record; what the residuals are at the end, by parameter."""
    import os

    os.environ |= {recording.RUN_DIR: where, recording.DETAIL_EVERY: every}
    try:
        model = jobs.wrap(jobs.network())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = distcomp.attach(model, optimizer, "qsgd:bits=1")
        jobs.train(model, optimizer, rank, steps=5)
        state = handle._sync.state_dict()["state"]  # type: ignore[attr-defined]
        handle.detach()
    finally:
        del os.environ[recording.RUN_DIR], os.environ[recording.DETAIL_EVERY]
    return {name: float(leaves["residual"].norm()) for name, leaves in state.items()}


def test_norms_errors_bytes_spans_and_memory_are_those_of_the_step(
    cluster: Callable[[int], Cluster], tmp_path: Path
) -> None:
    owed = cluster(2).run(looked_at, str(tmp_path / "run"), "4")
    run = recording.read_run(tmp_path / "run")
    for rank in (0, 1):
        records = run.of_kind("detail", rank)
        assert [record["step"] for record in records] == [0, 4]
        assert records[-1]["memory"]["state_bytes"] == 4 * sum(p.numel() for p in jobs.network().parameters())
        assert records[-1]["memory"]["peak_bytes"] > 1e6
    first, last = run.of_kind("detail")
    assert "parameters" not in run.of_kind("detail", 1)[0]
    found = last["parameters"]
    assert {name: one["residual_norm"] for name, one in found.items()} == pytest.approx(owed[0], rel=1e-5)
    for one in first["parameters"].values():  # nothing was owed before: error = |residual| / |gradient|
        assert one["error"] == pytest.approx(one["residual_norm"] / one["gradient_norm"], rel=1e-4)
        assert 0 <= one["error"] < 1
    assert max(one["error"] for one in first["parameters"].values()) > 0.3
    assert {one["numel"] for one in found.values()} == {p.numel() for p in jobs.network().parameters()}
    assert {span[1] for span in last["spans"]} == set(range(max(span[1] for span in last["spans"]) + 1))
    assert {span[0] for span in last["spans"]} == {"encode", "wait", "wire", "decode"}
    assert all(0 <= begin <= end for *_, begin, end in last["spans"])
    text = page(compare([run]))
    read(text)
    assert "Compression error |v − C(v)| / |v|, over steps" in text
    assert "qsgd:bits=1: step 4" in text
    assert "parameter by parameter, step 4" in text


def test_off_is_off(cluster: Callable[[int], Cluster], tmp_path: Path) -> None:
    cluster(2).run(looked_at, str(tmp_path / "run"), "0")
    run = recording.read_run(tmp_path / "run")
    assert len(run.of_kind("step")) == 5
    assert run.of_kind("detail") == []
    assert "What compression leaves out" not in page(compare([run]))


def test_a_cadence_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(recording.DETAIL_EVERY, "often")
    with pytest.raises(DistcompError, match="'often'; give a number of steps"):
        cadence()


@pytest.mark.parametrize(
    "wrong",
    [
        {"parameters": {"w": {"error": -1}}}, {"parameters": {"w": 3}}, {"spans": [["encode", 0, 0, 0.0]]},
        {"spans": [[1, 0, 0, 0.0, 1.0]]}, {"spans": [["wire", 0, 0, None, 1.0]]},
        {"memory": {"peak_bytes": "much"}}, {"ready_s": "soon"}, {"spans": 3}, {"spans": [3]},
    ],
)  # fmt: skip
def test_a_damaged_closer_look_is_named_by_its_line(tmp_path: Path, wrong: dict[str, Any]) -> None:
    run = synthetic.write(tmp_path / "run", synthetic.about("ddp"), {0: []})
    (run / "rank0.jsonl").write_text(json.dumps({"kind": "detail", "step": 0, **wrong}) + "\n")
    with pytest.raises(DistcompError, match=r"line 1 of .* is damaged"):
        recording.read_run(run)


CURVES = st.lists(
    st.lists(st.floats(0, 100), min_size=2, max_size=12, unique=True).map(sorted), min_size=2, max_size=4
)


@given(CURVES)
def test_means_over_seeds_are_numpys(curves: list[list[float]]) -> None:
    runs = [tuple((x, math.sin(x + at)) for x in xs) for at, xs in enumerate(curves)]
    found = averaged(runs)
    low, high = max(run[0][0] for run in runs), min(run[-1][0] for run in runs)
    if len({tuple(xs) for xs in curves}) > 1 and not low < high:
        assert found == ()
        return
    for x, mean, deviation in found:
        values = [np.interp(x, *np.array(run).T) for run in runs]
        assert mean == pytest.approx(np.mean(values), abs=1e-6)
        assert deviation == pytest.approx(np.std(values, ddof=1), abs=1e-6)
        assert interpolated(runs[0], x) == pytest.approx(values[0], abs=1e-6)


def test_long_curves_are_thinned_to_their_ends() -> None:
    points = tuple((float(x), float(x)) for x in range(10_001))
    thin = thinned(points)
    assert (len(thin), thin[0], thin[-1]) == (MOST, points[0], points[-1])
    assert set(thin) <= set(points)
    assert thinned(points[:5]) == points[:5]


@pytest.fixture(scope="module")
def priced(tmp_path_factory: pytest.TempPathFactory) -> str:
    runs = synthetic.experiment(tmp_path_factory.mktemp("runs"), seeds=2, methods=["ddp", "qsgd:bits=4"])
    comparison = compare([recording.read_run(path) for path in runs])
    return page(comparison, prices=Prices(per_rank_hour=2.0, per_gigabyte=0.5, watts=300))


def numbers(text: str, caption: str) -> list[dict[str, str]]:
    """The CSV of a figure."""
    (figure,) = (one for one in text.split("<figure") if f"<span>{caption}" in one)
    template = re.search(r'<template class="numbers">(.*?)</template>', figure, flags=re.DOTALL)
    assert template is not None
    return list(csv.DictReader(io.StringIO(escapes.unescape(template[1]))))


def test_runs_of_a_method_are_one_line_with_a_band_and_their_numbers(priced: str) -> None:
    rows = numbers(priced, "Test loss against seconds of training")
    assert {row["line"] for row in rows} == {"ddp, mean of 2", "qsgd:bits=4, mean of 2"}
    assert all(float(row["deviation over seeds"]) >= 0 for row in rows)
    assert priced.count('class="band ') == 2 * 2 * 6  # methods, widths, charts with seconds, bytes and prices
    assert "seed 1" not in priced


def test_cost_is_of_all_ranks_their_hours_and_their_bytes(priced: str) -> None:
    """4 ranks, 6,291,456 bytes in each of 250 steps."""
    last = [row for row in numbers(priced, "Test loss against cost of all workers") if row["line"][0] == "d"][
        -1
    ]
    seconds = [
        row for row in numbers(priced, "Test loss against seconds of training") if row["line"][0] == "d"
    ]
    by_bytes = 4 * 0.5 * 250 * 6_291_456 / 1e9
    hours = float(seconds[-1]["seconds of training"]) / 3600
    assert float(last["cost of all workers"]) == pytest.approx(by_bytes + 4 * 2.0 * hours, rel=0.01)
    energy = numbers(priced, "Test loss against energy of all workers")
    drawn = [row for row in energy if row["line"][0] == "d"][-1]["energy of all workers"]
    assert float(drawn) == pytest.approx(4 * 300 * hours / 1000, rel=0.02)


def test_every_figure_has_both_buttons_and_its_numbers(priced: str) -> None:
    reader = read(priced)
    tags = [tag for tag, _ in reader.tags]
    kinds = [attributes["data-save"] for _, attributes in reader.tags if "data-save" in attributes]
    assert kinds.count("svg") == kinds.count("csv") == tags.count("figure") == tags.count("template") == 8
    labels = [attributes["aria-label"] for _, attributes in reader.tags if "data-save" in attributes]
    assert len(set(labels)) == len(labels)
