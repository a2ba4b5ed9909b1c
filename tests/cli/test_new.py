"""``distcomp new`` and ``distcomp bench``: from a name to a row in a table beside plain DDP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distcomp.cli import main, new
from distcomp.recording import find_runs, read_run
from tests.cli.test_end_to_end import LEARNER, SOURCE, distcomp

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a method and a compressor of one's own, as they were written."""
    where = tmp_path_factory.mktemp("new")
    for kind, name in (("method", "coarse_mean"), ("compressor", "upper_half")):
        assert main(["new", kind, name, "-o", str(where)]) == 0
    (where / "learner.py").write_text(LEARNER)
    (where / "beside.py").write_text("NAME = 'beside'")
    return where


def test_what_is_written_passes_its_own_tests(begun: Path) -> None:
    written = {path.name for path in begun.glob("*.py")} - {"learner.py", "beside.py"}
    assert written == {
        f"{pattern.format(name)}" for name in ("coarse_mean", "upper_half") for pattern in new.FILES
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", "."]
    environment = {**os.environ, "PYTHONPATH": SOURCE, "CI": ""}
    done = subprocess.run(command, cwd=begun, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "9 passed" in done.stdout


def test_its_test_fails_once_the_method_is_another(begun: Path, tmp_path: Path) -> None:
    """Each of the two is broken in one place, and the test that came with it says so."""
    broken = {"coarse_mean": ("estimate, lambda: sent", "1.01 * estimate, lambda: sent"),
              "upper_half": ("torch.zeros(layout.numel, 4", "torch.ones(layout.numel, 4")}  # fmt: skip
    for path in begun.glob("*.py"):
        text = path.read_text()
        if path.stem in broken:
            assert broken[path.stem][0] in text
            text = text.replace(*broken[path.stem])
        (tmp_path / path.name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", "."]
    environment = {**os.environ, "PYTHONPATH": SOURCE, "CI": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    for test in ("test_every_step_is_the_oracle_s", "test_what_comes_back_is_the_oracle_s"):
        assert f"{test}" in done.stdout


def test_both_stand_in_the_list_and_in_a_table_beside_ddp(begun: Path) -> None:
    imports = ["--import", "coarse_mean.py", "--import", "upper_half.py"]
    listed = distcomp("methods", *imports, "--json", where=begun)
    out, err = listed.communicate(timeout=120)
    told = json.loads(out)
    assert "coarse_mean" in {one["name"] for one in told["methods"]}, err
    (mine,) = (one for one in told["compressors"] if one["name"] == "upper_half")
    assert (mine["settings"], round(mine["bits_per_value"])) == ({"kept": 2}, 16)
    methods = ["ddp", "coarse_mean:grid=0.01", "ef21:compressor=upper_half"]
    bench = ["bench", "--ranks", "2", "--repeats", "1", "--json", "-o", "out", *imports]
    process = distcomp(*bench, "--methods", ";".join(methods), "learner.py", "--seed", "3", where=begun)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    figures = json.loads(out)  # and nothing else is printed there
    rows = {row["method"]: row for row in figures["rows"]}
    assert list(rows) == methods
    assert rows["ddp"]["runs"] == 2
    assert rows[methods[2]]["payload_bytes"]["mean"] < 0.6 * rows["ddp"]["payload_bytes"]["mean"]
    assert "2 ranks on this machine, as it is" in err
    assert (begun / "out" / "report.html").read_text().count("on the network as it is") == 1
    about = [read_run(path).about for path in find_runs([begun / "out"])]
    assert {one["network"] for one in about} == {None}


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["new", "method", "Top-Half"], "'Top-Half' is no name for a method"),
        (["new", "method", "class"], "'class' is no name for a method"),
        (["new", "method", "qsgd"], "there is a method 'qsgd' already"),
        (["new", "compressor", "topk"], "there is a compressor 'topk' already"),
        (["new", "optimizer", "mine"], "invalid choice: 'optimizer'"),
        (["bench", "--ranks", "1", "nosuch.py"], "nothing to exchange below 2"),
        (["bench", "nosuch.py"], "nosuch.py is not a file"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    argv: list[str], told: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_left_alone(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "test_mine.py").write_text("precious")
    assert main(["new", "method", "mine", "-o", str(tmp_path)]) == 2
    assert "test_mine.py is there already and is left alone" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["test_mine.py"]
    assert (tmp_path / "test_mine.py").read_text() == "precious"
