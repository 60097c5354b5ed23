"""Show the status of one or more runs, and of their Slurm jobs."""

import argparse

from tetdist.apps.cli.common import program, run_command
from tetdist.apps.slurm.status import show
from tetdist.config.flags import Parser


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0, or 2 for a run that does not exist or is damaged."""
    options = parse_arguments(arguments)
    return run_command(lambda: show(options.runs, as_json=options.json), interrupted="interrupted")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog=program("status"),
        description="Show each run's state, step, loss, speed, ETA, evaluations, checkpoint and "
        "Slurm job.",
    )
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="run folder, name of a run in runs/, or folder of run folders (default: runs)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list of runs instead")
    return parser.parse_args(arguments)
