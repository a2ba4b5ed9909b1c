"""Prediction beside measurement, on the page and in the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distcomp import cli
from distcomp.report.figures import compare
from distcomp.report.predicted import pairs_of
from tests.report import synthetic


def advice(path: Path, **steps_s: float) -> Path:
    rows = [
        {"method": name.replace("_", ":bits="), "prediction": {"step_s": s}} for name, s in steps_s.items()
    ]
    path.write_text(json.dumps({"methods": rows}))
    return path


def test_the_error_is_of_the_prediction(tmp_path: Path) -> None:
    runs = synthetic.experiment(tmp_path, methods=["ddp", "bf16"])
    from distcomp.recording import read_run

    comparison = compare([read_run(run) for run in runs])
    measured = {row.method: row.spread("step_s") for row in comparison.rows}
    assert measured["ddp"] is not None
    (one,) = pairs_of(comparison, {"ddp": 2 * measured["ddp"].mean, "qsgd:bits=8": 1.0})
    assert (one.method, one.measured_s) == ("ddp", measured["ddp"].mean)
    assert one.error == pytest.approx(1.0)


def test_the_command_lays_both_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthetic.experiment(tmp_path / "runs", methods=["ddp", "bf16"])
    told = advice(tmp_path / "advice.json", ddp=0.5, bf16=0.25, qsgd_4=0.1)
    page = tmp_path / "page.html"
    given = ["report", str(tmp_path / "runs"), "--advice", str(told), "-o", str(page)]
    assert cli.main(given) == 0
    assert "predicted" in capsys.readouterr().out
    html = page.read_text()
    assert "What was predicted of a step" in html
    assert html.index("What was predicted") < html.index("Under which conditions")
    assert cli.main([*given, "--json"]) == 0
    beside = json.loads(capsys.readouterr().out)["predicted"]
    assert [one["method"] for one in beside] == ["ddp", "bf16"]
    assert beside[0]["predicted_s"] == 0.5


def test_without_advice_the_page_says_nothing_of_it(tmp_path: Path) -> None:
    synthetic.experiment(tmp_path / "runs", methods=["ddp"])
    assert cli.main(["report", str(tmp_path / "runs"), "-o", str(tmp_path / "page.html")]) == 0
    assert "What was predicted" not in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("text", ["no json", '{"methods": [{"method": "ddp"}]}'])
def test_what_is_no_advice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    synthetic.experiment(tmp_path / "runs", methods=["ddp"])
    (tmp_path / "advice.json").write_text(text)
    assert cli.main(["report", str(tmp_path / "runs"), "--advice", str(tmp_path / "advice.json")]) == 2
    assert "is no advice" in capsys.readouterr().err


def test_advice_of_other_methods_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthetic.experiment(tmp_path / "runs", methods=["ddp"])
    other = advice(tmp_path / "advice.json", qsgd_4=0.1)
    assert cli.main(["report", str(tmp_path / "runs"), "--advice", str(other)]) == 2
    assert "none of these was measured" in capsys.readouterr().err
