"""Parsers and arguments shared by several commands, and upper limits of some settings.

A value above such a limit is a typing error that would fill the memory or end the process.
"""

import argparse
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from tetdist.wording import meant

MOST_TIMESTEPS = 10_000
MOST_PIXELS = 8192  # height or width
MOST_THREADS = 512  # threads or processes of one command
MOST_PREFETCHED = 64  # batches


class Parser(argparse.ArgumentParser):
    """A parser that refuses abbreviated flags, and suggests one for a mistaken flag."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Print a mistake as one sentence, without the list of all flags, and exit."""
        flags = re.findall(r"--[\w.-]+", message) if message.startswith("unrecognized") else []
        hints = [self.meant(flag) for flag in flags]
        names = [str(argument.metavar) for argument in self._get_positional_actions()]
        if message.startswith("one of the arguments"):  # it names the flags that may replace one
            message = f"give {' and '.join(names)}"
        key = re.match(r"unrecognized arguments: (\w+)[\w.]*=", message)
        if key and "RUN_OR_FILE" in names:
            flag = f"--{key[1]}" if f"--{key[1]}" in self._option_string_actions else "flags"
            hints.append(f"use {flag}, not keys")
        if value := re.search(r"invalid choice: '(.*?)'.*choose from (.*)\)", message):
            # The word nearest to a short one, such as gpu, often means something else.
            known = re.findall(r"[^', ]+", value[2]) if len(value[1]) > 3 else []
            first = f"write {self.prog} {known[0]} {value[1]}" if "/" in value[1] else ""
            hints = [meant(value[1], known, first)]
        text = "; ".join([message, *filter(None, dict.fromkeys(hints))])
        self.exit(2, f"error: {text} ({self.prog} --help explains all flags)\n")

    def meant(self, flag: str) -> str:
        """Return the flag that an unknown one may have meant, as a part of a sentence."""
        commands = self._subparsers._group_actions[0].choices if self._subparsers else None
        parsers = [self, *(commands.values() if isinstance(commands, dict) else ())]
        options = [option for parser in parsers for option in parser._option_string_actions]
        words = [option[2:] for option in options if option.startswith("--")]
        word = flag.lstrip("-")
        begun = (known for known in words if known.startswith(word))
        return meant(next(begun, word), words, "", {known: f"--{known}" for known in words})


def add_import(parser: argparse.ArgumentParser) -> None:
    """Add ``--import``, which may be repeated."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="FILE.py",
        help="a Python file that registers models, neurons, losses, ... of your own",
    )


def import_flags(files: Iterable[object]) -> list[str]:
    """Return the flags of `add_import` for files."""
    return [word for file in files for word in ("--import", str(file))]


def positive(text: str, most: int | None = None) -> int:
    """Type of an argument that counts something.

    Raises:
        argparse.ArgumentTypeError: It is no integer above 0, or above ``most``.
    """
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be 1 or more")
    if most is not None and value > most:
        raise argparse.ArgumentTypeError(f"{value} must be at most {most}")
    return value
