"""How a run is, or several: state, progress, results, checkpoint, from their folders alone.

    python tools/status.py runs/quickstart
    python tools/status.py quickstart other_run
    python tools/status.py                       (all of runs/)
    watch -n 10 python tools/status.py runs/STUDY

Of one run some lines, of several a table. It asks nobody, Slurm neither; `slurm status` does that.
"""

import argparse
import json
from pathlib import Path

from tetdist.cli.common import answer, program


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 2 for a run that is not there."""
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
        default=["runs"],
        metavar="RUN",
        help="a run folder, its name in runs/, or a folder of run folders (default: runs)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead, a list of runs")
    return parser.parse_args(arguments)


def show(options: argparse.Namespace) -> None:
    from tetdist.reports.run_status import JobEvent, as_table, as_text, find_runs, read_status
    from tetdist.slurm.history import history
    from tetdist.tracking.metrics_file import strict

    def last_event(folder: Path) -> JobEvent | None:
        events = history(folder)
        return JobEvent(events[-1].kind, events[-1].job, events[-1].text) if events else None

    statuses = [read_status(run, last_event(run)) for run in find_runs(options.runs)]
    if options.json:
        print(json.dumps(strict([status.as_dict() for status in statuses]), indent=1))
    elif len(statuses) == 1:
        print(as_text(statuses[0]))
    else:
        print(as_table(statuses))
