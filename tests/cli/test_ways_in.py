"""The ways into the shell that a newcomer takes: torchrun's spellings, own methods, damaged input."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distcomp.cli import emulate, main
from distcomp.cli.run import dated_directory
from distcomp.errors import DistcompError
from distcomp.methods import METHODS
from distcomp.transports.throttle import SlowLink
from tests.report import synthetic

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    synthetic.experiment(tmp_path / "runs", methods=["ddp", "qsgd:bits=4"])
    return tmp_path / "runs"


def test_methods_take_turns_and_the_baseline_runs_twice(tmp_path: Path) -> None:
    def order(*methods: str, repeats: int = 1) -> list[str]:
        return [
            planned.shown for planned in emulate.Experiment(tmp_path, (), methods, tmp_path, repeats).runs
        ]

    assert order("ddp", "bf16") == ["ddp", "bf16", "ddp (again)"]
    assert order("ddp", "bf16", repeats=2) == ["ddp", "bf16", "ddp (again)", "bf16 (again)"]
    assert order("ddp") == ["ddp"]
    assert order("bf16", "qsgd") == ["bf16", "qsgd"]
    assert order("bf16", repeats=3) == ["bf16", "bf16 (again)", "bf16 (3)"]


def test_run_takes_torchrun_s_own_spellings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    asked: list[list[str]] = []

    def torchrun(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        asked.append(command[3:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", torchrun)
    for spelling in (["--nproc-per-node", "3"], ["--nproc_per_node=3"], ["--nproc", "3"]):
        assert main(["run", *spelling, "train.py", "-m", "x"]) == 0
    assert main(["run", "--nproc-per-node=3", "-m", "package.train", "--lr", "1"]) == 0
    assert asked[:3] == [["--standalone", "--nproc-per-node=3", "train.py", "-m", "x"]] * 3
    assert asked[3] == ["--standalone", "--nproc-per-node=3", "-m", "package.train", "--lr", "1"]


@pytest.mark.parametrize("name", ["qsgd", "qsgd:bits=4", "Quantize", "torch:fp16"])
def test_methods_shows_one(name: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["methods", name]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(name.partition(":")[0])
    assert max(map(len, shown.splitlines())) <= 80
    assert "\n\n" not in shown.rstrip()
    assert main(["methods", "--json", name]) == 0
    assert name.startswith(json.loads(capsys.readouterr().out)["name"])


MINE = """\
from distcomp.methods import Method, register
from distcomp.methods.basic import NoCommunication

@register(paper="none", wire="0", summable=True, biased=False)
def OWN() -> Method:
    '''Of the user's own.'''
    return NoCommunication()
"""


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing that a test registers stays."""
    monkeypatch.setenv("DISTCOMP_IMPORT", "")
    monkeypatch.syspath_prepend("")  # so that it puts the path back: --import adds to it
    before = dict(METHODS)
    yield
    for name in METHODS.keys() - before.keys():
        del METHODS[name]


@pytest.mark.usefixtures("own")
def test_a_method_of_one_s_own_is_known_by_its_file_module_or_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("by_file", "by_module", "by_entry"):
        (tmp_path / f"{name}_methods.py").write_text(MINE.replace("OWN", name))
    assert main(["methods", "by_file", "--import", "by_file_methods.py"]) == 0
    assert main(["methods", "by_module", "--import", "by_module_methods"]) == 0
    paths = os.environ["DISTCOMP_IMPORT"].split(",")
    assert paths == [str(tmp_path / f"{name}_methods.py") for name in ("by_file", "by_module")]
    information = tmp_path / "mine-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    (information / "entry_points.txt").write_text("[distcomp_methods]\nmine = by_entry_methods\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["methods", "by_entry"]) == 0
    assert capsys.readouterr().out.count("Of the user's own.") == 3


def test_a_full_disk_is_one_sentence(runs: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "distcomp", "report", "--json", str(runs)], stdout=full,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 2
    assert (
        done.stderr == "distcomp: the output cannot be written (No space left on device); make room there\n"
    )


def test_a_file_is_not_written_through_a_link_that_was_planted(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in (".page.html.partial", ".page.html.00.partial"):
        (tmp_path / name).symlink_to(victim)
    assert main(["report", str(runs), "-o", str(tmp_path / "page.html")]) == 0
    assert victim.read_text() == "precious"
    monkeypatch.setattr(secrets, "token_hex", lambda _: "00")
    assert main(["report", str(runs), "-o", str(tmp_path / "page.html")]) == 2
    assert victim.read_text() == "precious"


THROTTLES = {
    "DISTCOMP_THROTTLE_BPS": ["0", "abc", "nan", "", "-1"],
    "DISTCOMP_DELAY_S": ["1e9", "-1", "inf", "nan", "fast"],
}


@pytest.mark.parametrize("variable", THROTTLES)
def test_a_throttle_that_makes_no_sense_is_named(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in THROTTLES[variable]:
        monkeypatch.setenv(variable, value)
        with pytest.raises(DistcompError, match=f"{variable}={value} is no number from"):
            SlowLink.from_env()


UNFIT = {
    "a number for a name": ({3: torch.ones(2)}, "3 for a name"),
    "sparse": ({"a": torch.ones(2, 2).to_sparse()}, "a has the layout"),
    "meta": ({"a": torch.ones(2, device="meta")}, "a has no values"),
    "code": ({"a": print}, "no saved state dict"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_compress_says_what_it_cannot_take(what: str, tmp_path: Path, capsys: Captured) -> None:
    state, said = UNFIT[what]
    torch.save(state, tmp_path / "model.pt")
    assert main(["compress", str(tmp_path / "model.pt"), "-o", str(tmp_path / "model.dcz")]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "\x1b" not in told
    assert told.count("\n") == 1


def test_a_command_replaces_what_it_wrote_and_nothing_else(
    runs: Path, tmp_path: Path, capsys: Captured
) -> None:
    """Also not the model that is compressed, nor the page that stands in the directory of the runs."""
    torch.save({"a": torch.ones(9)}, tmp_path / "model.pt")
    model, packed, again = (str(tmp_path / name) for name in ("model.pt", "model.dcz", "again.pt"))
    page = str(runs / "report.html")
    for _ in range(2):
        assert main(["report", str(runs)]) == 0
        assert main(["compress", model, "-o", packed]) == 0
        assert main(["decompress", packed, "-o", again]) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    Path(page).write_text("<html>mine</html>")
    before[Path(page)] = b"<html>mine</html>"
    for refused in (
        ["report", str(runs)],
        ["report", str(runs), "-o", model],
        ["compress", model, "-o", model],
        ["decompress", packed, "-o", packed],
        ["decompress", packed, "-o", page],
    ):
        capsys.readouterr()
        assert main(refused) == 2
        assert "is left alone; name another file with -o" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


def test_two_runs_that_begin_in_the_same_second_have_directories_of_their_own(tmp_path: Path) -> None:
    assert len({dated_directory(tmp_path / "runs") for _ in range(5)}) == 5
