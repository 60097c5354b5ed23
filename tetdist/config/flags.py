"""Arguments that several commands take."""

import argparse


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


def positive(text: str) -> int:
    """Type of an argument that counts something.

    Raises:
        argparse.ArgumentTypeError: It is no whole number above 0.
    """
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: the least is 1")
    return value
