"""What the Tab key offers: asked of bash itself, and held to the parsers; zsh and fish where they are."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

import pytest

from distcomp.cli import completion, main, parser
from distcomp.methods import METHODS

METHOD_NAMES = completion.method_names()
DESCRIBED = completion.subcommands_of(parser(), METHOD_NAMES)


def script_of(shell: str) -> str:
    return completion.WRITERS[shell](DESCRIBED)


def options_of(command: str) -> set[str]:
    """As argparse knows them."""
    (commands,) = (one for one in parser()._actions if isinstance(one, argparse._SubParsersAction))
    return set(commands.choices[command]._option_string_actions)


ASKED = ["", "em", "methods ", "new ", "new me", "bench -", "run --method q", "emulate --ranks ", "report "]


@pytest.fixture(scope="module")
def offered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """What bash's own machinery answers to each of the beginnings, in one shell."""
    where = tmp_path_factory.mktemp("shell")
    (where / "train.py").touch()
    (where / "distcomp.bash").write_text(script_of("bash"))
    beginnings = ASKED + [f"{command.name} -" for command in DESCRIBED]
    lines = ["source distcomp.bash", "complete -p distcomp >/dev/null || exit 3"]
    for beginning in beginnings:
        words = " ".join(f"'{word}'" for word in ["distcomp", *beginning.split(" ")])
        lines.append(f"COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _distcomp")
        lines.append('echo "${COMPREPLY[*]}"')
    done = subprocess.run(
        ["bash", "--norc", "-u", "-e", "-c", "\n".join(lines)], cwd=where, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {
        beginning: set(line.split())
        for beginning, line in zip(beginnings, done.stdout.splitlines(), strict=True)
    }


def test_bash_offers_commands_options_methods_and_files(offered: dict[str, set[str]]) -> None:
    names = {command.name for command in DESCRIBED}
    assert offered[""] == names | {"--help", "--version"}
    assert offered["em"] == {"emulate"}
    assert offered["new "] == {"method", "compressor"}
    assert offered["new me"] == {"method"}
    assert offered["run --method q"] == {name for name in METHODS if name.startswith("q")}
    assert offered["methods "] == {name for name in METHOD_NAMES if ":" not in name}
    assert offered["report "] == {"train.py", "distcomp.bash"}
    assert offered["emulate --ranks "] == set()


@pytest.mark.parametrize("command", DESCRIBED, ids=lambda one: one.name)
def test_bash_offers_every_option_of_the_parser_and_no_other(
    offered: dict[str, set[str]], command: completion.Subcommand
) -> None:
    assert offered[f"{command.name} -"] == options_of(command.name)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_another_shell_can_read_it_and_every_option_is_there(shell: str, tmp_path: Path) -> None:
    script = script_of(shell)
    for command in DESCRIBED:
        for option in options_of(command.name):
            told = {"zsh": f"'*{option}[", "fish": f" -{'l' if option[:2] == '--' else 's'} "}[shell]
            assert told in script, (command.name, option)
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here to read what was written for it")
    (tmp_path / "script").write_text(script)
    done = subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_fish_itself_offers_the_options_of_a_command(tmp_path: Path) -> None:
    if shutil.which("fish") is None:
        pytest.skip("there is no fish here to ask")
    (tmp_path / "script").write_text(script_of("fish"))
    asked = f"source {tmp_path / 'script'}; complete -C 'distcomp bench --'; complete -C 'distcomp new '"
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "XDG_CONFIG_HOME": str(tmp_path)}
    done = subprocess.run(["fish", "-c", asked], capture_output=True, text=True, env=environment)
    told = {line.split("\t")[0] for line in done.stdout.splitlines()}
    assert {option for option in options_of("bench") if option.startswith("--")} <= told
    assert {"method", "compressor"} <= told


def test_the_command_prints_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out == script_of("zsh")
    assert main(["completion", "powershell"]) == 2
    assert "choose from 'bash', 'zsh', 'fish'" in capsys.readouterr().err
