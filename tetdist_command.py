"""Starts the commands: `tetdist COMMAND`, and what tools/, launch/ and tetdist/train.py type.

`import tetdist` loads torch and timm, which takes seconds. A command answers --help and mistakes
before that, and sets variables that torch reads when it is loaded; so it asks tetdist/__init__.py,
by TETDIST_COMMAND, to load nothing ahead. That is why this module is outside the package.
"""

import importlib
import os
import sys


def run(name: str, arguments: list[str] | None = None) -> int:
    """Exit status of the command in tetdist/cli/NAME.py, with ``sys.argv``'s arguments."""
    os.environ["TETDIST_COMMAND"] = name
    try:
        command = importlib.import_module(f"tetdist.cli.{name}")
    except ModuleNotFoundError as error:
        source = "." if error.name == "tetdist" else "'tetdist[train]'"
        print(f"error: {error.name} is not installed: pip install {source}", file=sys.stderr)
        return 2
    return int(command.main(arguments))


def main() -> int:
    """Run ``tetdist COMMAND ...``."""
    from_shell = sys.argv[1:]
    return run(from_shell[0], from_shell[1:])
