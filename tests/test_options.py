"""Options are frozen: a new key or flag shows in the diff of a list.

Renew it with `UPDATE_OPTIONS=1 python -m pytest tests/test_options.py`.
"""

import argparse
import functools
import importlib
import os

import pytest
import tiny

import tetdist_command
from tetdist.config.documentation import documented_keys

LIST = tiny.PROJECT / "tests" / "golden" / "options.txt"
COMMANDS = [*tetdist_command.COMMANDS, "slurm status", "slurm cancel", "slurm resume"]


class Asked(Exception):
    """Raised with the parser in place of its help."""


@functools.cache
def parsers(command):
    """The parser of a command, and those of its own commands, by name."""

    def asked(parser, *_):
        raise Asked(parser)

    name, *rest = command.split()
    module = importlib.import_module(f"tetdist.apps.cli.{name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "print_help", asked)
        with pytest.raises(Asked) as caught:
            module.main([*rest, "--help"])
    of_command = {command: caught.value.args[0]}
    for action in of_command[command]._actions:
        if isinstance(action, argparse._SubParsersAction):
            of_command |= {f"{command} {one}": parser for one, parser in action.choices.items()}
    return of_command


def options():
    """A line for each key, and for each command with its positions and flags."""
    lines = sorted(documented_keys())
    for command in COMMANDS:
        for name, parser in parsers(command).items() if command != "torchrun" else ():
            flags = ["/".join(a.option_strings) or a.dest.upper() for a in parser._actions]
            lines.append(" ".join([f"{name}:", *flags]))
    return "\n".join([*lines, ""])


def test_keys_and_flags_are_those_of_the_list():
    if os.environ.get("UPDATE_OPTIONS"):
        LIST.write_text(options())
    assert options() == LIST.read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_every_command_has_a_text(command):
    # The flags of torchrun are torch's.
    assert command == "torchrun" or not any(p.allow_abbrev for p in parsers(command).values())
    assert [
        (name, action.dest)
        for name, parser in parsers(command).items()
        for action in parser._actions
        # The commands of a command, and torchrun's script with its arguments, have their own.
        if not action.help and action.nargs not in (argparse.PARSER, argparse.REMAINDER)
    ] == []
