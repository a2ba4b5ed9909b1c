"""What the pages tell people to type can be typed, and what is then shown fits the terminal. All commands are
run by ``python -m benchmarks.newcomer``."""

from __future__ import annotations

import io
import math
import re
import sys
from pathlib import Path

import pytest

from distcomp import cli
from distcomp.advice.advise import Advice, AdviceRow
from distcomp.advice.predict import Prediction
from distcomp.cli import advise
from distcomp.network import Fabric
from tests.project import newcomer
from tests.project.pages import ROOT, Command, commands
from tests.terminal import faults, shown

TYPED = commands()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return newcomer.furnish(tmp_path_factory.mktemp("newcomer") / "here")


def test_all_ways_in_are_among_the_commands() -> None:
    assert {command.program for command in TYPED} >= {"distcomp", "torchrun", "mpirun", "scripts/demo"}
    assert {one.words[1] for one in TYPED if one.program == "distcomp"} >= {
        "run", "emulate", "advise", "simulate", "report", "compress", "decompress", "doctor",
    }  # fmt: skip


@pytest.mark.parametrize("command", TYPED, ids=lambda one: f"{one.where}: {one.text[:60]}")
def test_a_command_of_the_pages_names_what_there_is(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = command.words
    if "distcomp" in words and "build" not in words:
        for module in cli.COMMANDS:
            monkeypatch.setattr(module, "run", lambda arguments: 0)
        assert cli.main(words[words.index("distcomp") + 1 :]) == 0
    for word in words:
        if re.match(r"(launchers|scripts|examples|docker)/\S+\.\w+$", word):
            assert (ROOT / word).is_file(), word
    if command.program.startswith(("scripts/", "launchers/")):
        assert (ROOT / command.program).stat().st_mode & 0o111


class Terminal(io.StringIO):
    """Standard output, as a program sees a terminal."""

    def isatty(self) -> bool:
        return True


def on_a_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stdout", terminal)
    return terminal


@pytest.mark.parametrize("table", ["report", "compress", "methods", "doctor"])
@pytest.mark.parametrize("columns", [60, 72, 80, 120])
def test_a_table_keeps_every_name_whole_and_fits_the_terminal(
    table: str, columns: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, names = newcomer.TABLES[table]
    monkeypatch.chdir(place)
    terminal = on_a_terminal(columns, monkeypatch)
    assert cli.main(command) == 0
    assert faults(terminal.getvalue(), columns, True, names) == [], terminal.getvalue()


@pytest.mark.parametrize("columns", [60, 72, 80, 120])
def test_advice_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["ddp", "qsgd:bits=4", "powersgd:rank=4"]
    efficiency = dict.fromkeys((2, 16, 128), 0.5)
    prediction = Prediction(2.667, 0.1, 0.1, 0.1, 1e9)
    rows = tuple(AdviceRow(name, prediction, 1.5, math.inf, efficiency) for name in names)
    terminal = on_a_terminal(columns, monkeypatch)
    advise.show(Advice(rows, Fabric.uniform(4), 0.4, 1000, {}, noise=0.1))
    assert faults(terminal.getvalue(), columns, True, names) == [], terminal.getvalue()
    assert "2,667 ms" in terminal.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_the_report_in_a_process_of_its_own(terminal: bool, place: Path) -> None:
    command, names = newcomer.TABLES["report"]
    status, text = shown([*newcomer.DISTCOMP, *command], 60, terminal, place)
    assert status == 0
    assert faults(text, 60, terminal, names) == []


def test_a_compressor_and_a_method_of_one_s_own_stand_in_the_emulator_s_table(place: Path) -> None:
    """The files are those of CONTRIBUTING; each stands alone in the ranks, too."""
    own = [word for name in newcomer.OWN for word in ("--import", name)]
    methods = "averaging_toy; ef21:compressor=three_bytes"
    status, text = shown(
        [*newcomer.DISTCOMP, "emulate", "--no-packets", "--ranks", "1", *own, "--methods", methods,
         "-o", "own", "train.py"], 80, False, place,
    )  # fmt: skip
    assert status == 0, text
    for name in methods.split("; "):
        assert re.search(rf"^{name} ", text, flags=re.MULTILINE), text
