"""Show the status of one or more runs, read from their folders; Slurm is not asked."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from tetdist.apps.cli.common import fail, program, run_command
from tetdist.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0, or 2 for a run that does not exist or is damaged."""
    options = parse_arguments(arguments)
    return run_command(lambda: show(options), interrupted="interrupted")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program("status"),
        description="Show each run's state, step, loss, speed, ETA, evaluations and checkpoint.",
    )
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="run folder, name of a run in runs/, or folder of run folders (default: runs)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list of runs instead")
    return parser.parse_args(arguments)


def show(options: argparse.Namespace) -> int:
    """Print the runs; among several, a damaged run is a row, and its error follows the table."""
    from tetdist.apps.reports import run_status
    from tetdist.apps.reports.compare import reading
    from tetdist.apps.reports.run_status import RunStatus
    from tetdist.apps.slurm.history import history
    from tetdist.tracking.metrics_file import strict

    folders = run_status.find_runs(options.runs)

    def status_of(folder: Path) -> RunStatus:
        try:
            with reading():
                events = [(one.kind, one.job, one.text) for one in history(folder)[-1:]]
                return run_status.read_status(folder, *events)
        except UserError as error:
            if len(folders) == 1:
                raise
            return run_status.damaged(folder, str(error))

    statuses = [status_of(folder) for folder in folders]
    if options.json:
        print(json.dumps(strict([asdict(status) for status in statuses]), indent=1))
    elif not statuses:
        print("there are no runs yet in runs/")
    elif len(statuses) == 1:
        print(run_status.as_text(statuses[0]))
    else:
        print(run_status.as_table(statuses))
    found = [status for status in statuses if status.state == run_status.DAMAGED]
    sys.stdout.flush()
    for status in found:
        fail(UserError(status.text))
    return 2 if found else 0
