"""Submit a run to a Slurm cluster once; it requeues itself until it is finished."""

import logging
import sys

from tetdist.apps.cli.common import run_command
from tetdist.apps.slurm import command


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 success, 2 a user error."""
    options = command.parse_arguments(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return run_command(lambda: command.run(options), interrupted="interrupted")
