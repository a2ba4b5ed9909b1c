"""``distcomp completion``: what the Tab key knows in bash, zsh and fish, from the parsers themselves."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distcomp.errors import DistcompError

DESCRIPTION = """\
Print a script that completes distcomp's commands, options, methods and files.
Once, and again when methods of other packages come or go (bash, zsh, fish):

  distcomp completion bash \\
    > ~/.local/share/bash-completion/completions/distcomp
  distcomp completion zsh > "${fpath[1]}/_distcomp"
  distcomp completion fish > ~/.config/fish/completions/distcomp.fish
"""
NAMED = ("--method", "--methods", "name")
"""The arguments whose value is the name of a method."""


@dataclass(frozen=True)
class Completed:
    """One argument: ``flags`` (none: it stands without any), and what its value may be: ``words`` to choose
    from, a file, or something that nobody can guess."""

    flags: tuple[str, ...]
    help: str
    takes_value: bool
    words: tuple[str, ...] = ()
    file: bool = False


@dataclass(frozen=True)
class Subcommand:
    """A command with all that it takes."""

    name: str
    help: str
    arguments: tuple[Completed, ...]

    @property
    def options(self) -> tuple[Completed, ...]:
        """Those with a flag."""
        return tuple(one for one in self.arguments if one.flags)

    @property
    def positional(self) -> tuple[Completed, ...]:
        """Those without."""
        return tuple(one for one in self.arguments if not one.flags)


def add(commands: Any) -> None:
    """Describe the command."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        "completion", help="complete commands with the Tab key", description=DESCRIPTION,
        formatter_class=plain,
    )  # fmt: skip
    parser.add_argument("shell", choices=tuple(WRITERS), metavar="SHELL", help="bash, zsh or fish")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    from distcomp.cli import parser

    print(WRITERS[arguments.shell](subcommands_of(parser(), method_names())), end="")
    return 0


def method_names() -> tuple[str, ...]:
    """Of every registered method, and of PyTorch's own. Plugins that cannot be imported are left out."""
    from distcomp.cli.methods import HOOK_SUMMARIES
    from distcomp.plugins import load_plugins
    from distcomp.registry import METHODS, load_all

    load_all()
    with suppress(DistcompError):  # every other command says so
        load_plugins()
    return tuple(sorted([*METHODS, *HOOK_SUMMARIES]))


def subcommands_of(parser: argparse.ArgumentParser, methods: Sequence[str]) -> tuple[Subcommand, ...]:
    """The commands of a parser."""
    (commands,) = (one for one in parser._actions if isinstance(one, argparse._SubParsersAction))
    helps = {choice.dest: choice.help or "" for choice in commands._choices_actions}
    return tuple(
        Subcommand(name, helps[name], tuple(_completed(one, methods) for one in below._actions))
        for name, below in commands.choices.items()
    )


def _completed(action: argparse.Action, methods: Sequence[str]) -> Completed:
    names = methods if {action.dest, *action.option_strings} & set(NAMED) else ()
    words = tuple(map(str, action.choices)) if action.choices is not None else tuple(names)
    file = action.type is Path or action.dest == "imports" or action.nargs == argparse.REMAINDER
    described_as = (action.help or "").replace("%%", "%")
    return Completed(tuple(action.option_strings), described_as, action.nargs != 0, words, file)


def bash(commands: Sequence[Subcommand]) -> str:
    """The script for bash."""
    names = " ".join(command.name for command in commands)
    return BASH.format(
        names=names,
        pattern=names.replace(" ", "|"),
        values="".join(_bash_values(commands)),
        flags="".join(
            f"        {command.name}) words={_quoted(_flags(command))} ;;\n" for command in commands
        ),
        free="".join(_bash_free(commands)),
    )


BASH = """\
# completes distcomp in bash; written by: distcomp completion bash
_distcomp() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command="" words="" at
    for ((at = 1; at < COMP_CWORD; at++)); do
        case ${{COMP_WORDS[at]}} in {pattern}) command=${{COMP_WORDS[at]}}; break ;; esac
    done
    COMPREPLY=()
    case $command$before in
{values}    esac
    if [[ -z $command ]]; then
        mapfile -t COMPREPLY < <(compgen -W "{names} --help --version" -- "$word")
    elif [[ $word == -* ]]; then
        case $command in
{flags}        esac
        mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
    else
        case $command in
{free}        esac
    fi
}}
complete -o filenames -F _distcomp distcomp
"""
_FILES = 'mapfile -t COMPREPLY < <(compgen -f -- "$word")'


def _bash_values(commands: Sequence[Subcommand]) -> Iterator[str]:
    """What may stand behind an option, one case for each."""
    for command in commands:
        for one in command.options:
            if one.takes_value:
                pattern = "|".join(command.name + flag for flag in one.flags)
                yield f"        {pattern}) {_bash_offer(one)} return ;;\n"


def _bash_free(commands: Sequence[Subcommand]) -> Iterator[str]:
    for command in commands:
        words = tuple(word for one in command.positional for word in one.words)
        file = any(one.file for one in command.positional)
        if words or file:
            yield f"            {command.name}) {_bash_offer(Completed((), '', True, words, file))} ;;\n"


def _bash_offer(one: Completed) -> str:
    # bash cuts words at a colon, so that a name with one cannot be offered whole
    words = " ".join(word for word in one.words if ":" not in word)
    if words:
        return f'mapfile -t COMPREPLY < <(compgen {"-f " if one.file else ""}-W "{words}" -- "$word");'
    return f"{_FILES};" if one.file else ""


def _flags(command: Subcommand) -> str:
    return " ".join(flag for one in command.options for flag in one.flags)


def zsh(commands: Sequence[Subcommand]) -> str:
    """The script for zsh."""
    told = "\n".join(f"    {_quoted(f'{one.name}:{_plain(one.help)}')}" for one in commands)
    cases = "\n".join(
        f"    {command.name})\n        _arguments \\\n            "
        + " \\\n            ".join(_zsh_arguments(command))
        + " ;;"
        for command in commands
    )
    return ZSH.format(told=told, cases=cases)


ZSH = """\
#compdef distcomp
# completes distcomp in zsh; written by: distcomp completion zsh
_distcomp() {{
    local -a commands
    commands=(
{told}
    )
    if (( CURRENT == 2 )); then
        _describe command commands
        return
    fi
    local command=$words[2]
    shift words
    (( CURRENT-- ))
    case $command in
{cases}
    esac
}}
if [[ $funcstack[1] == _distcomp ]]; then  # autoloaded from fpath
    _distcomp "$@"
else
    compdef _distcomp distcomp
fi
"""


def _zsh_arguments(command: Subcommand) -> Iterator[str]:
    for one in command.options:
        for flag in one.flags:
            value = f":value:{_zsh_offer(one)}" if one.takes_value else ""
            yield _quoted(f"*{flag}[{_plain(one.help)}]{value}")
    for at, one in enumerate(command.positional, start=1):
        many = "*" if at == len(command.positional) else f"{at}"
        yield _quoted(f"{many}:{_plain(one.help) or 'argument'}:{_zsh_offer(one)}")


def _zsh_offer(one: Completed) -> str:
    if one.words:
        return f"({' '.join(word.replace(':', chr(92) + ':') for word in one.words)})"
    return "_files" if one.file else " "


def fish(commands: Sequence[Subcommand]) -> str:
    """The script for fish."""
    lines = ["# completes distcomp in fish; written by: distcomp completion fish", "complete -c distcomp -f"]
    for flag, said in (("help", "say what there is"), ("version", "print the version and exit")):
        lines.append(f"complete -c distcomp -n __fish_use_subcommand -l {flag} -d {_quoted(said)}")
    for command in commands:
        lines.append(
            f"complete -c distcomp -n __fish_use_subcommand -a {command.name} -d {_quoted(command.help)}"
        )
    for command in commands:
        within = f"complete -c distcomp -n '__fish_seen_subcommand_from {command.name}'"
        for one in command.arguments:
            lines.append(" ".join([within, *_fish_flags(one), *_fish_offer(one), "-d", _quoted(one.help)]))
    return "\n".join(lines) + "\n"


def _fish_flags(one: Completed) -> Iterator[str]:
    for flag in one.flags:
        yield f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"


def _fish_offer(one: Completed) -> Iterator[str]:
    if one.flags and one.takes_value:
        yield "-r"
    if one.file:
        yield "-F"
    if one.words:
        yield f"-a {_quoted(' '.join(one.words))}"


def _quoted(text: str) -> str:
    """For any of the three shells: in single quotes, its own in double ones."""
    return "'" + text.replace("'", "'\"'\"'").replace("\n", " ") + "'"


def _plain(text: str) -> str:
    """Without what zsh reads as the end of a description."""
    return re.sub(r"[\[\]:`\\]", " ", text)


WRITERS: dict[str, Callable[[Sequence[Subcommand]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
