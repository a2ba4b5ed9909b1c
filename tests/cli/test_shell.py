"""Each command, called as the shell calls it: what it prints, its status, and how it speaks of mistakes."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from distcomp import compressors, recording
from distcomp.cli import COMMANDS, doctor, emulate, main, methods
from distcomp.cli.prefork import imports
from distcomp.cli.progress import Tail, progress
from distcomp.cli.run import new_directory
from distcomp.errors import DistcompError
from distcomp.methods import METHODS
from distcomp.registry import COMPRESSORS
from distcomp.report import as_json, as_text, compare
from distcomp.report.claims import verdict
from tests.report import synthetic

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def eighty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    synthetic.experiment(tmp_path / "runs", methods=["ddp", "qsgd:bits=4"])
    return tmp_path / "runs"


@pytest.mark.usefixtures("eighty")
@pytest.mark.parametrize("command", ["", *(module.__name__.rpartition(".")[2] for module in COMMANDS)])
def test_help_fits_eighty_columns(command: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as done:
        main([*command.split(), "--help"])
    assert done.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5
    assert max(map(len, lines)) <= 80


@pytest.mark.usefixtures("eighty")
def test_methods_lists_every_method_and_compressor(capsys: Captured) -> None:
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    headings = {line.split()[0] for line in lines if line and not line.startswith(" ")}
    assert headings >= METHODS.keys() | methods.HOOK_SUMMARIES.keys()


def test_methods_as_json_has_what_the_registry_has(capsys: Captured) -> None:
    assert main(["methods", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {one["name"] for one in told["methods"]} == METHODS.keys()
    for one in told["methods"]:
        entry = METHODS[one["name"]]
        assert one["paper"] == entry.paper
        assert one["wire"] == entry.wire
        assert (one["summable"], one["biased"]) == (entry.summable, entry.biased)
        assert one["settings"].keys() == entry.parameters.keys()
        assert one["summary"]
    named = [getattr(compressors, name) for name in compressors.__all__]
    public = {one for one in named if isinstance(one, type)}
    expected = {one for one in public if issubclass(one, compressors.Compressor) and is_dataclass(one)}
    toys = {name for name, entry in COMPRESSORS.items() if "toy" in entry.make.__module__}
    assert {one["name"] for one in told["compressors"]} - toys == {one.__name__ for one in expected}
    bits = {one["name"]: one.get("bits_per_value") for one in told["compressors"]}
    assert bits["Identity"] == pytest.approx(32, abs=0.01)
    assert bits["Cast"] == pytest.approx(16, abs=0.01)
    assert bits["Quantize"] == pytest.approx(4 + 32 / 512, abs=0.01)


def test_every_stock_method_and_every_registered_one_can_be_asked_for() -> None:
    for name in [*methods.HOOK_SUMMARIES, "torch:powersgd:rank=2", "qsgd:bits=4"]:
        methods.check(name)


def test_doctor_has_a_remedy_for_each_lack(capsys: Captured) -> None:
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    checks = {one["check"] for one in told}
    assert checks >= {"python", "torch", "backends", "gpu", "compiler", "kernels", "emulation", "rich"}
    for one in told:
        assert one["status"] in ("ok", "lack")
        assert bool(one["remedy"]) == (one["status"] == "lack"), one
        assert one["found"]


@pytest.mark.usefixtures("eighty")
def test_doctor_in_words_fits_eighty_columns_and_a_fault_is_a_status(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = [
        doctor.Finding("python", "ok", "3.11"),
        doctor.Finding("backends", "fault", "none", "install " + "another torch " * 9),
    ]
    monkeypatch.setattr(doctor, "examine", lambda: iter(findings))
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ok    python     3.11"
    assert lines[2].strip().startswith("remedy: install another torch")
    assert max(map(len, lines)) <= 80


def test_report_prints_the_table_and_writes_the_page(
    runs: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report.html").write_text("mine")
    assert main(["report", str(runs)]) == 0
    comparison = compare([recording.read_run(path) for path in recording.find_runs([runs])])
    sentence = verdict(comparison).sentence
    assert capsys.readouterr().out == f"{as_text(comparison)}\n\n{sentence}\n\nwrote {runs}/report.html\n"
    assert (runs / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert (tmp_path / "report.html").read_text() == "mine"
    assert not list(runs.glob(".*"))


def test_report_as_json_writes_no_page_unless_asked(
    runs: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", "--json", "--target", "0.5", str(runs)]) == 0
    comparison = compare([recording.read_run(path) for path in recording.find_runs([runs])], 0.5)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(as_json(comparison)))
    assert not (runs / "report.html").exists()
    assert main(["report", "--json", "-o", "other.html", str(runs)]) == 0
    assert (tmp_path / "other.html").exists()


MISTAKES = {
    "no such command": (["dance"], "invalid choice"),
    "a command misspelt": (["emulat"], "did you mean emulate?"),
    "an option misspelt": (["report", "--targt=1", "{runs}"], "did you mean --target?"),
    "a method misspelt": (["emulate", "--method", "qsdg:bits=4", "{script}"], "did you mean 'qsgd'?"),
    "a method to show that is none": (["methods", "powersdg"], "did you mean 'powersgd'?"),
    "a method of one's own": (["emulate", "--method", "averaging_toy", "{script}"], "--import FILE.py"),
    "a module that is not there": (["run", "--import", "absent_module", "{script}"], "absent_module"),
    "no processes": (["run", "--nproc", "0", "{script}"], "--nproc is '0'"),
    "a GPU that is not there": (["run", "--nproc_per_node", "gpu", "{script}"], "no GPU"),
    "no hosts": (["run", "--nnodes", "0", "{script}"], "do not fit"),
    "a meeting place that nobody knows": (
        ["run", "--nnodes", "2", "--master", "no.such.host.invalid:29500", "{script}"],
        "is not known here",
    ),
    "a port that is none": (
        ["run", "--nnodes", "2", "--master", "localhost:99999", "{script}"],
        "port 99999",
    ),
    "advice that is a script": (["report", "{runs}", "--advice", "{script}"], "> advice.json"),
    "PyTorch's own, simulated": (
        ["simulate", "--workers", "2", "--method", "ddp", "{script}"],
        "simulate identity",
    ),
    "a rate in bytes": (["emulate", "--rate", "100MBps", "{script}"], "is in bytes"),
    "a fabric of millions": (["emulate", "--ranks", "100000000", "{script}"], "100,000 at most"),
    "a model that is a script": (["compress", "{script}", "-o", "{tmp}/m.dcz"], "no saved state dict"),
    "no model": (["compress", "{tmp}/absent", "-o", "{tmp}/m.dcz"], "cannot be read"),
    "no run": (["report", "{tmp}"], "holds no run"),
    "a run without end": (["report", "{tmp}/absent"], "holds no run"),
    "a page that cannot be written": (["report", "{runs}", "-o", "{tmp}/no/where.html"], "cannot be written"),
    "a page over a script": (["report", "{runs}", "-o", "{script}"], "is no page of distcomp report"),
    "a target that is no number": (["report", "{runs}", "--target", "low"], "invalid float"),
    "no script": (["emulate", "{tmp}/absent.py"], "is not a file"),
    "nothing to run": (["run"], "required: SCRIPT"),
    "an unknown method": (["emulate", "--method", "zip", "{script}"], "no method 'zip'"),
    "an unknown hook": (["run", "--method", "torch:zip", "{script}"], "none of PyTorch's hooks"),
    "an unknown setting": (["emulate", "--methods", "ddp; qsgd:bytes=1", "{script}"], "no setting 'bytes=1'"),
    "an unreadable rate": (["emulate", "--rate", "fast", "{script}"], "'fast'"),
    "no ranks": (["emulate", "--ranks", "0", "{script}"], "number of ranks"),
    "two networks": (["emulate", "--fabric", "f.toml", "--rate", "1mbit", "{script}"], "leave out"),
    "no fabric": (["emulate", "--fabric", "{tmp}/absent.toml", "{script}"], "cannot be read"),
    "a directory in use": (["emulate", "-o", "{runs}", "{script}"], "is not empty"),
    "records in use": (["run", "-o", "{runs}", "{script}"], "is not empty"),
    "hosts without a meeting place": (["run", "--nnodes", "2", "{script}"], "--master HOST:PORT"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_with_a_remedy_and_status_2(
    mistake: str, runs: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend("")  # so that it puts the path back: --import adds to it
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('must not run')")
    argv, expected = MISTAKES[mistake]
    assert main([one.format(tmp=tmp_path, runs=runs, script=script) for one in argv]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert told.err.startswith("distcomp: ")
    assert expected in told.err
    assert ";" in told.err


def test_ctrl_c_is_status_130_and_says_nothing(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(methods, "run", interrupted)
    assert main(["methods"]) == 130
    assert capsys.readouterr() == ("", "")


def test_no_command_prints_help(capsys: Captured) -> None:
    assert main([]) == 2
    assert "emulate" in capsys.readouterr().out


def test_a_reader_that_leaves_early_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """``distcomp methods | head -1``, where the pipe is closed before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["methods"]) == 0


@pytest.mark.parametrize(("status", "told"), [(0, 0), (1, 1), (-signal.SIGKILL, 137)])
def test_run_gives_torchrun_its_options_and_passes_its_status_on(
    status: int, told: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.py").write_text("")
    monkeypatch.chdir(tmp_path)
    asked: list[list[str]] = []

    def torchrun(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        asked.append([*command, env["DISTCOMP_METHOD"]])
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(subprocess, "run", torchrun)
    several = ["--nnodes", "2", "--node-rank", "1", "--master", "localhost:29500"]
    assert main(["run", "--nproc", "4", "--method", "bf16", "train.py", "--lr", "1"]) == told
    assert main(["run", *several, "--method", "bf16", "train.py"]) == told
    assert asked[0][3:] == ["--standalone", "--nproc-per-node=4", "train.py", "--lr", "1", "bf16"]
    assert asked[1][3:] == [
        "--nproc-per-node=1", "--nnodes=2", "--node-rank=1", "--master-addr=localhost", "--master-port=29500",
        "train.py", "bf16",
    ]  # fmt: skip


def test_methods_are_split_at_semicolons_and_named_once() -> None:
    given = argparse.Namespace(methods=" ddp; qsgd:bits=4,block=64 ;", method=["bf16", "ddp"])
    assert emulate._methods(given) == ("ddp", "qsgd:bits=4,block=64", "bf16")
    assert emulate._methods(argparse.Namespace(methods=None, method=None))[0] == "ddp"


def test_records_sort_as_the_methods_were_named(tmp_path: Path) -> None:
    named = ("qsgd:bits=4,block=64", "ddp", "qsgd:bits=4")
    experiment = emulate.Experiment(tmp_path / "s.py", (), named, tmp_path)
    directories = [planned.directory.name for planned in experiment.runs]
    assert directories == ["01-qsgd-bits=4-block=64", "02-ddp", "03-qsgd-bits=4", "04-ddp"]


def test_a_new_directory_is_made_and_a_used_one_refused(tmp_path: Path) -> None:
    assert new_directory(tmp_path / "a" / "b").is_dir()
    assert new_directory(tmp_path / "a" / "b").is_dir()
    (tmp_path / "a" / "b" / "file").write_text("")
    with pytest.raises(DistcompError, match="not empty"):
        new_directory(tmp_path / "a" / "b")
    with pytest.raises(DistcompError, match="cannot be made"):
        new_directory(tmp_path / "a" / "b" / "file" / "c")


def test_what_a_script_imports_is_found_but_not_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "folder").mkdir()
    script = tmp_path / "script.py"
    script.write_text(
        "from __future__ import annotations\nimport json, beside\nimport folder.inside\nimport os.path as p\n"
        "from xml.dom import minidom\nif True:\n    import hidden\ndef f():\n    import late\n"
    )
    found = list(imports(script))
    assert found[:2] == ["torch", "torch.distributed"]
    assert found[found.index("distcomp") + 1 :] == ["json", "os.path", "xml.dom"]


def test_a_tail_reads_each_line_once_and_leaves_half_lines(tmp_path: Path) -> None:
    tail = Tail(tmp_path)
    tail.read()
    assert (tail.steps, tail.learnt) == (0, "")
    path = tmp_path / "rank0.jsonl"
    path.write_text('{"kind": "note", "steps": 9}\n{"kind": "step", "step": 0}\n{"kind": "st')
    tail.read()
    tail.read()
    assert (tail.steps, tail.of_steps) == (1, 9)
    with path.open("a") as file:
        file.write(
            'ep", "step": 1}\n{"kind": "metric", "step": 2, "test_loss": 0.5, "test_accuracy": 0.75}\n'
        )
    tail.read()
    assert (tail.steps, tail.learnt) == (2, "loss 0.500 accuracy 75.0 %")


def test_progress_in_lines_where_there_is_no_terminal(tmp_path: Path, capsys: Captured) -> None:
    records = [{"kind": "step", "step": at} for at in range(3)]
    records.append({"kind": "metric", "step": 3, "train_s": 1.0, "test_loss": 1.234, "test_accuracy": 0.5})
    synthetic.write(tmp_path / "run", synthetic.about("ddp"), {0: records})
    with progress(["bf16", "ddp"]) as shown, shown.method("ddp", tmp_path / "run"):
        pass
    assert capsys.readouterr().err.splitlines() == [
        "[2/2] ddp ...",
        "[2/2] ddp: 3 steps loss 1.234 accuracy 50.0 %",
    ]
