"""Status of runs and of their jobs."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from tetdist.apps.reports import run_status
from tetdist.apps.reports.run_status import JobStatus, RunStatus
from tetdist.apps.slurm import history, jobs
from tetdist.apps.slurm.history import JobEvent, Submission
from tetdist.apps.slurm.jobs import State
from tetdist.errors import UserError, without_passwords
from tetdist.tracking.metrics_file import strict


def find(name: str) -> list[Path]:
    """Return the submitted runs of a name, as in `run_status.find_runs`, the oldest first."""
    runs = run_status.find_runs([name])
    submitted = [run for run in runs if history.newest_submission(run)] or runs
    return sorted(submitted, key=lambda run: history.submission_of(run).time)


def show(names: Sequence[str], *, as_json: bool = False) -> int:
    """Print the statuses of runs; return the exit status, 2 if one of them is damaged.

    Among several, a damaged run is a row, and its error follows the table.
    """
    statuses = read(list(dict.fromkeys(run_status.find_runs(names))))
    if as_json:
        print(json.dumps(strict([asdict(status) for status in statuses]), indent=1))
    elif not statuses:
        print("there are no runs yet in runs/")
    elif len(statuses) == 1:
        print(run_status.as_text(statuses[0]))
    else:
        print(run_status.as_table(statuses))
    sys.stdout.flush()
    damaged = [status.text for status in statuses if status.state == run_status.DAMAGED]
    for text in damaged:
        print(f"error: {without_passwords(text)}", file=sys.stderr)
    return 2 if damaged else 0


def read(folders: Sequence[Path]) -> list[RunStatus]:
    """Return the statuses of runs; a damaged run among several has its error as text.

    Slurm is asked before the folders are read, because a run may end in between.
    """
    submissions = {
        run: submission
        for run in folders
        if (submission := history.newest_submission(run)) is not None
    }
    asked = [submission for run, submission in submissions.items() if not is_finished(run)]
    states = jobs.states_of(asked)

    def status_of(run: Path) -> RunStatus:
        submission = submissions.get(run)
        if submission is None:
            return run_status.read_status(run)
        state = states.get(submission.job) or jobs.by_the_run(submission)
        return run_status.read_status(run, job_status(submission, state))

    statuses: list[RunStatus] = []
    for run in folders:
        try:
            statuses.append(status_of(run))
        except (UserError, OSError) as error:
            if len(folders) == 1:
                raise
            statuses.append(run_status.damaged(run, str(error)))
    return statuses


def job_status(submission: Submission, state: State) -> JobStatus:
    """Return the status of a run's job, whose state is known."""
    events = history.history(Path(submission.run_dir))
    return JobStatus(
        id=submission.job,
        state=state.name.lower(),
        text=state.text,
        log=str(submission.log_file),
        restarts=[
            f"{datetime.fromtimestamp(e.time):%Y-%m-%d %H:%M:%S}  from step {e.step}: {e.text}"
            for e in history.restarts(events)
        ],
        failure=None if state.is_queued else failure_of(events, submission),
    )


def failure_of(events: list[JobEvent], submission: Submission) -> str | None:
    """Return why the newest start failed: the first rank's error, or a line of the history.

    None if it did not fail.
    """
    mine = [event for event in events if event.job == submission.job and event.kind != "submitted"]
    if not mine or mine[-1].kind in ("finished", "stopped", "cancelled"):
        return None
    last = mine[-1]
    text = history.first_failure(Path(submission.log), submission.job, last.restart)
    return text or (last.text if last.kind == "failed" else None)


def is_finished(run_dir: Path) -> bool:
    return [event.kind for event in history.history(run_dir)][-1:] == ["finished"]
