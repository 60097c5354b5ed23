"""Arguments shared by several commands, and upper limits of some settings.

A value above such a limit is a typing error that would fill the memory or end the process.
"""

import argparse
from typing import Any

MOST_TIMESTEPS = 10_000
MOST_PIXELS = 8192  # height or width
MOST_THREADS = 512  # threads or processes of one command
MOST_PREFETCHED = 64  # batches


class Parser(argparse.ArgumentParser):
    """A parser of flags that refuses abbreviated ones, which argparse would complete."""

    def __init__(self, **given: Any) -> None:
        super().__init__(allow_abbrev=False, **given)


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


def positive(text: str, most: int | None = None) -> int:
    """Type of an argument that counts something.

    Raises:
        argparse.ArgumentTypeError: It is no whole number above 0, or above ``most``.
    """
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be 1 or more")
    if most is not None and value > most:
        raise argparse.ArgumentTypeError(f"{value} must be at most {most}")
    return value
