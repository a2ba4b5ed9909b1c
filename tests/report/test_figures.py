"""The table's numbers are those that an independent reading of the records gives."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distcomp import recording
from distcomp.errors import DistcompError
from distcomp.report import as_json, as_text, compare, words
from tests.report import oracle, synthetic

seconds = st.floats(1e-4, 10, allow_nan=False)


@st.composite
def rank_records(draw: st.DrawFn, rank: int) -> list[dict[str, Any]]:
    """What one rank might record; anything may be missing, and the queue's counter may begin anew."""
    records: list[dict[str, Any]] = []
    train_s = 0.0
    for step in range(draw(st.integers(1, 6))):
        records.append(
            {
                "kind": "step", "step": step,
                "step_s": draw(st.none() | seconds),
                "payload_bytes": draw(st.none() | st.integers(0, 10**9)),
                "qdisc_bytes": draw(st.none() | st.integers(0, 10**10)),
            }
        )  # fmt: skip
        train_s += draw(seconds)
        if rank == 0 and draw(st.booleans()):
            loss = st.floats(-1, 5) | st.just(float("nan"))
            records.append(
                {
                    "kind": "metric", "step": step + 1, "train_s": train_s,
                    "test_loss": draw(st.none() | loss), "test_accuracy": draw(st.none() | st.floats(0, 1)),
                }
            )  # fmt: skip
    return records


@st.composite
def experiments(draw: st.DrawFn) -> dict[str, list[oracle.Records]]:
    """Methods, and the records of each of their runs."""
    methods = draw(st.lists(st.sampled_from(["ddp", "bf16", "qsgd:bits=4", "none"]), min_size=1, unique=True))
    ranks = draw(st.integers(1, 3))
    return {
        method: [
            {rank: draw(rank_records(rank)) for rank in range(ranks)} for _ in range(draw(st.integers(1, 3)))
        ]
        for method in methods
    }


def written(experiment: dict[str, list[oracle.Records]], parent: Path) -> list[recording.Run]:
    return [
        recording.read_run(
            synthetic.write(parent / f"{method}-{at}", synthetic.about(method, seed=at), records)
        )
        for method, runs in experiment.items()
        for at, records in enumerate(runs)
    ]


@settings(deadline=None, max_examples=40)
@given(experiments(), st.none() | st.floats(-1, 5))
def test_every_figure_equals_the_oracle_s(
    experiment: dict[str, list[oracle.Records]], asked: float | None
) -> None:
    parent = Path(tempfile.mkdtemp())
    try:
        told = as_json(compare(written(experiment, parent), asked))
    finally:
        shutil.rmtree(parent)
    json.dumps(told, allow_nan=False)

    target = asked if asked is not None else oracle.default_target(experiment.get("ddp", []))
    assert told["target_loss"] == (None if target is None else pytest.approx(target))
    baseline = oracle.spread([oracle.to_target_s(run, target) for run in experiment.get("ddp", [])])
    for row, (method, runs) in zip(told["rows"], experiment.items(), strict=True):
        assert (row["method"], row["runs"]) == (method, len(runs))
        expected = {
            "test_loss": [oracle.last(run, "test_loss") for run in runs],
            "test_accuracy": [oracle.last(run, "test_accuracy") for run in runs],
            "payload_bytes": [oracle.payload_bytes(run) for run in runs],
            "wire_bytes": [oracle.wire_bytes(run) for run in runs],
            "step_s": [oracle.step_s(run) for run in runs],
            "to_target_s": [oracle.to_target_s(run, target) for run in runs],
        }
        for name, values in expected.items():
            assert close(row[name], oracle.spread(values)), name
        assert row["reached_target"] == sum(one is not None for one in expected["to_target_s"])
        mine = oracle.spread(expected["to_target_s"])
        speed_up = baseline["mean"] / mine["mean"] if mine and baseline else None
        assert row["speed_up"] == (None if speed_up is None else pytest.approx(speed_up))


def close(told: dict[str, Any] | None, expected: dict[str, Any] | None) -> bool:
    if told is None or expected is None or isinstance(expected["mean"], str):
        return told == expected
    return bool(told == pytest.approx(expected, rel=1e-9, abs=1e-12))


def test_where_the_time_went_adds_up_to_the_mean_step(tmp_path: Path) -> None:
    run = recording.read_run(synthetic.training(tmp_path / "run", "qsgd:bits=4", steps=20))
    spent = compare([run]).rows[0].spent_s()
    later = run.of_kind("step", 0)[1:]
    assert spent is not None
    assert sum(spent.values()) == pytest.approx(sum(one["step_s"] for one in later) / len(later))
    assert spent["wait"] == pytest.approx(sum(one["exposed"]["wait_s"] for one in later) / len(later))
    assert spent["compute"] > 0


def test_phases_that_exceed_the_step_are_not_shown_as_a_split(tmp_path: Path) -> None:
    exposed = {"encode_s": 0.0, "recode_s": 0.0, "wait_s": 2.0, "decode_s": 0.0}
    records = [{"kind": "step", "step": at, "step_s": 1.0, "exposed": exposed} for at in range(3)]
    run = recording.read_run(synthetic.write(tmp_path / "run", synthetic.about("ddp"), {0: records}))
    assert compare([run]).rows[0].spent_s() is None


def test_the_best_is_the_soonest_that_is_neither_baseline_nor_control(tmp_path: Path) -> None:
    runs = [recording.read_run(path) for path in synthetic.experiment(tmp_path)]
    comparison = compare(runs)
    assert comparison.best is not None
    assert comparison.best.method == "qsgd:bits=1"
    easy = compare(runs, target_loss=2.0)
    soonest = min(easy.rows, key=lambda row: row.to_target_s.mean if row.to_target_s else 1e9)
    assert soonest.method == "none"
    assert easy.best is not None
    assert easy.best.method == "qsgd:bits=1"
    assert compare(runs, target_loss=-1.0).best is None
    assert compare([run for run in runs if run.method != "ddp"]).target_loss is None


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"ranks": 8}, "number of ranks"),
        ({"argv": ["other.py"]}, "script"),
        ({"network": {"asked": "4 ranks at 1gbit"}}, "network"),
        ({"network": synthetic.NETWORK | {"real": False}}, "network"),
        ({"network": synthetic.NETWORK | {"fabric": "ranks = 4\n"}}, "fabric"),
    ],
)
def test_runs_that_cannot_stand_side_by_side_are_refused(
    tmp_path: Path, more: dict[str, Any], named: str
) -> None:
    one = synthetic.write(tmp_path / "one", synthetic.about("ddp"), {0: []})
    two = synthetic.write(tmp_path / "two", synthetic.about("bf16", **more), {0: []})
    with pytest.raises(DistcompError, match=f"differ in their {named}"):
        compare([recording.read_run(one), recording.read_run(two)])


@pytest.mark.parametrize(("final", "target"), [(2.0, 2.1), (-2.0, -1.9)])
def test_the_target_is_easier_than_what_ddp_ends_with(tmp_path: Path, final: float, target: float) -> None:
    metric = {"kind": "metric", "step": 1, "train_s": 1.0, "test_loss": final}
    run = recording.read_run(synthetic.write(tmp_path / "run", synthetic.about("ddp"), {0: [metric]}))
    assert compare([run]).target_loss == pytest.approx(target)


def test_no_run_is_an_error() -> None:
    with pytest.raises(DistcompError, match="no run"):
        compare([])


def test_seeds_become_one_row_with_a_spread(tmp_path: Path) -> None:
    runs = [
        recording.read_run(path) for path in synthetic.experiment(tmp_path, seeds=3, methods=["ddp", "bf16"])
    ]
    comparison = compare(runs)
    assert [len(row.runs) for row in comparison.rows] == [3, 3]
    assert [one.seed for one in comparison.rows[1].runs] == [0, 1, 2]
    text = as_text(comparison)
    assert "ddp (3 runs)" in text
    assert "±" in text


def test_a_column_that_nobody_fills_is_left_out(tmp_path: Path) -> None:
    records = [{"kind": "step", "step": at, "step_s": 0.1} for at in range(3)]
    run = recording.read_run(synthetic.write(tmp_path / "run", synthetic.about("bf16"), {0: records}))
    heading = as_text(compare([run])).splitlines()[1].split()
    assert heading == ["method", "per", "step"]


@given(st.floats(1e-6, 1e12))
def test_a_number_is_written_to_three_digits_without_powers_of_ten(value: float) -> None:
    text = words.formatted(value, words.number)
    assert "e" not in text
    assert float(text) == pytest.approx(value, rel=0.00501)
    if value < 999:
        assert len(text.replace(".", "").lstrip("0")) == 3


@given(st.floats(0, 1e14))
def test_a_size_has_a_unit_and_at_most_three_digits_before_the_point(nbytes: float) -> None:
    figure, unit = words.formatted(nbytes, words.size).split()
    factor = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(figure) * factor == pytest.approx(nbytes, rel=0.00501, abs=0.5)
    assert unit == "TB" or len(figure.partition(".")[0]) <= 3


def test_words() -> None:
    assert words.formatted(0.0321, words.seconds) == "32.1 ms"
    assert words.formatted(130.04, words.seconds) == "130 s"
    assert words.formatted(0.8912, words.percent) == "89.1 %"
    assert words.formatted(float("nan"), words.loss) == "diverged"
    assert words.formatted(0.99951, words.number) == "1.00"
