"""Show the status of one or more runs, read from their folders.

    python tools/status.py runs/quickstart
    python tools/status.py quickstart other_run
    python tools/status.py                       (all of runs/)
    watch -n 10 python tools/status.py runs/STUDY

Of one run some lines, of several a table. It asks nobody, Slurm neither; `slurm status` does that.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from tetdist.apps.cli.common import answer, fail, program
from tetdist.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 2 for a run that is not there or damaged."""
    options = parse_arguments(arguments)
    return answer(lambda: show(options), interrupted="interrupted")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program("status"),
        description="How a run is: state, epoch, step, loss, speed, ETA, evaluations, checkpoint.",
    )
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="a run folder, its name in runs/, or a folder of run folders (default: runs)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead, a list of runs")
    return parser.parse_args(arguments)


def show(options: argparse.Namespace) -> int:
    """Show the runs; of several a damaged one is a row, and its error comes behind the table.

    Returns:
        Exit status.

    Raises:
        UserError: There is no such run, or the only one is damaged.
    """
    from tetdist.apps.reports import run_status
    from tetdist.apps.reports.compare import reading
    from tetdist.apps.reports.run_status import JobEvent, RunStatus
    from tetdist.apps.slurm.history import history
    from tetdist.tracking.metrics_file import strict

    def last_event(folder: Path) -> JobEvent | None:
        events = history(folder)
        return JobEvent(events[-1].kind, events[-1].job, events[-1].text) if events else None

    folders = run_status.find_runs(options.runs)

    def status_of(folder: Path) -> RunStatus:
        try:
            with reading():
                return run_status.read_status(folder, last_event(folder))
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
