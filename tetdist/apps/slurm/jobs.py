"""State of a job as Slurm reports it: in the queue, or how it ended."""

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tetdist.apps.slurm import history
from tetdist.apps.slurm.history import Submission
from tetdist.errors import UserError, typed

PATIENCE = 60.0  # seconds that a Slurm command may take, including its retries
PAUSE = 1.0  # seconds before a retry
PING_TIMEOUT = 60.0  # seconds


@dataclass(frozen=True)
class State:
    """State of a job.

    Attributes:
        name: Slurm's state, RUNNING, PENDING, COMPLETED, FAILED, ...; ``unknown`` if Slurm has
            forgotten the job and the run's folder does not record its end.
    """

    name: str
    text: str  # its nodes, the reason for waiting, or how it ended
    is_queued: bool


def is_here() -> bool:
    """Return whether this machine can submit jobs."""
    return shutil.which("sbatch") is not None and shutil.which("srun") is not None


def check_here(otherwise: str) -> None:
    """Refuse a machine without Slurm; ``otherwise`` is another way out."""
    if not is_here():
        text = "there is no Slurm here (no sbatch on the PATH); run this on a login node, or "
        raise UserError(text + otherwise)


def state_of(submission: Submission) -> State:
    """Return a job's state; see `states_of`."""
    return states_of([submission])[submission.job]


def states_of(submissions: Sequence[Submission]) -> dict[str, State]:
    """Return the states of several jobs by id, asking Slurm, which serves many users, about all.

    If Slurm does not know a job, or is not here, the state is by the run's folder.
    """
    states: dict[str, State] = {}
    for query_state in (_in_the_queue, _by_accounting) if is_here() else ():
        if left := [one.job for one in submissions if one.job not in states]:
            states |= query_state(left)
    return {one.job: by_the_run(one) for one in submissions} | states


def _in_the_queue(jobs: Sequence[str]) -> dict[str, State]:
    command = ("squeue", "-h", "-j", ",".join(jobs), "-o", "%i|%T|%r|%N|%M|%l|%S")
    status, output, errors = query(*command)
    # squeue fails for a single job that left the queue long ago.
    if status != 0 and "Invalid job id" not in errors:
        raise UserError(f"Slurm does not answer: {errors.strip() or 'squeue failed'}")
    states: dict[str, State] = {}
    for line in output.splitlines() if status == 0 else ():
        job, name, reason, nodes, elapsed, limit, start = line.split("|")
        if nodes:
            text = f"on {nodes}, {elapsed} of {limit}"
        else:
            text = f"waiting: {reason}" + (f", may start {start}" if start != "N/A" else "")
        states[job] = State(name, text, is_queued=True)
    return states


def _by_accounting(jobs: Sequence[str]) -> dict[str, State]:
    states: dict[str, State] = {}
    command = ("sacct", "-X", "-n", "-P", "-j", ",".join(jobs), "-o", "JobID,State,ExitCode,End")
    status, output, _ = query(*command)
    for line in output.splitlines() if status == 0 else ():
        job, name, exit_code, end = line.split("|")
        states[job] = State(name.split()[0], f"exit status {exit_code}, {end}", is_queued=False)
    return states


def by_the_run(submission: Submission) -> State:
    """Return the state of a job that Slurm does not know, by the run's history."""
    events = history.history(Path(submission.run_dir))
    last = [event for event in events if event.job == submission.job][-1:]
    if not last or last[0].kind == "submitted":
        return State("unknown", "Slurm does not know the job, and it did not start", False)
    kind, moment = last[0].kind, datetime.fromtimestamp(last[0].time)
    ends = {"finished": "COMPLETED", "failed": "FAILED", "cancelled": "CANCELLED"}
    text = f"by the run's history, {kind} {moment:%Y-%m-%dT%H:%M:%S}"
    return State(ends.get(kind, "unknown"), text, is_queued=False)


def refuse_if_queued(run_dir: Path) -> None:
    """Refuse a run with a job in the queue: two jobs must not train in one folder."""
    submission = history.newest_submission(run_dir)
    if submission is not None and (state := state_of(submission)).is_queued:
        raise UserError(
            f"{run_dir} is already queued as job {submission.job} ({state.name}); watch it with "
            f"`{typed('slurm', 'status', run_dir)}`, cancel it with "
            f"`{typed('slurm', 'cancel', run_dir)}`, or give this run another name=..."
        )


def cancel(job: str) -> None:
    """Cancel a job; a running one saves first."""
    status, _, errors = query("scancel", job)
    if status != 0:
        raise UserError(f"Slurm did not cancel job {job}: {errors.strip()}")


def query(*command: str, patience: float | None = None) -> tuple[int, str, str]:
    """Run a Slurm command, and return its exit status, output and error output.

    A command that a busy or absent controller does not answer is retried. All commands here are
    safe to repeat.
    """
    patience = PATIENCE if patience is None else patience
    end = time.monotonic() + patience
    is_reported = False
    while True:
        left = end - time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(left, 1.0))
        except FileNotFoundError as error:
            text = f"{command[0]} is not on the PATH; run this on a login node"
            raise UserError(text) from error
        except subprocess.TimeoutExpired as error:
            raise UserError(
                f"Slurm does not answer: {command[0]} took more than {patience:.0f} s; try later"
            ) from error
        is_late = done.returncode != 0 and ("timed out" in done.stderr or not _controller_is_up())
        if not is_late or time.monotonic() + PAUSE > end:
            return done.returncode, done.stdout.strip(), done.stderr
        if not is_reported:
            print(
                f"Slurm does not answer {command[0]}; retrying for up to {patience:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            is_reported = True
        time.sleep(PAUSE)


def _controller_is_up() -> bool:
    # The error of a command does not tell: `scontrol requeue` calls it an unexpected message.
    try:
        done = subprocess.run(("scontrol", "ping"), capture_output=True, timeout=PING_TIMEOUT)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 and b"DOWN" not in done.stdout
