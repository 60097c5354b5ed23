"""Record of a run's jobs, in the folder slurm/ of the run.

    slurm/
        history.jsonl           one line an event: submitted, started, stopped, finished, failed
        submission-1/           first submission; later ones have the next numbers
            submission.json     job id, numbers of the plan, paths of the rest
            config.yaml         configuration of the job, with absolute paths
            code/               code that the job runs (`resume` uses that of an earlier submission)
            12_0_log.out        output of rank 0 of job 12, in all its starts; 12_1_...: rank 1
            failure-12.0-2.txt  error of rank 2 in job 12 before its first restart

Training does not need this folder: checkpoints alone decide where a run resumes.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fcntl import LOCK_EX, flock
from pathlib import Path
from typing import Any, Literal

from tetdist.errors import UserError, typed
from tetdist.storage import selection
from tetdist.storage.files import explaining, parse_json, write_json, write_text


@dataclass(frozen=True)
class Submission:
    """Submitted job."""

    job: str  # Slurm's id
    run_dir: str
    config: str  # file
    code: str  # folder
    log: str  # folder of the logs and failures
    cluster: dict[str, Any]  # settings
    last_step: int
    time: float  # Unix time in seconds
    after: list[str] = field(default_factory=list)  # folders of runs that must be finished first

    @property
    def log_file(self) -> Path:
        return Path(self.log) / f"{self.job}_0_log.out"


EventKind = Literal["submitted", "started", "stopped", "finished", "failed", "cancelled"]


@dataclass(frozen=True)
class JobEvent:
    """Line of history.jsonl."""

    kind: EventKind
    job: str
    restart: int = 0  # number of earlier starts of the job
    step: int = 0  # of the newest checkpoint
    text: str = ""  # the reason, or the hosts
    time: float = field(default_factory=lambda: round(time.time(), 3))


def slurm_folder(run_dir: Path) -> Path:
    return run_dir / "slurm"


def next_submission(run_dir: Path) -> Path:
    """Make the folder of a new submission."""
    numbers = [number for number, _ in _submissions(run_dir)]
    folder = slurm_folder(run_dir) / f"submission-{max(numbers, default=0) + 1}"
    with explaining(folder):
        folder.mkdir(parents=True)
    return folder


def note_submission(folder: Path, submission: Submission) -> None:
    """Record a submission in its folder and in the run's history."""
    write_json(folder / "submission.json", asdict(submission))
    note(Path(submission.run_dir), JobEvent("submitted", submission.job))


def newest_submission(run_dir: Path) -> Submission | None:
    """Return the run's newest submission; None if it was never submitted.

    If its file is damaged, it has no settings, and its job is that of the history.
    """
    for _, folder in sorted(_submissions(run_dir), reverse=True):
        if (file := folder / "submission.json").is_file():
            try:
                return Submission(**parse_json(file.read_bytes()))
            except (TypeError, ValueError):
                return _remembered(run_dir, folder)
    return None


def _remembered(run_dir: Path, folder: Path) -> Submission:
    """Return what is known of a submission without its file."""
    event = next(iter(since_submission(history(run_dir))), None)
    if event is None:
        raise UserError(
            f"{folder / 'submission.json'} and the history beside {folder.name}/ are damaged: "
            f"cancel the run's job, if it has one, with `scancel`, and remove {folder}"
        )
    config, log = (str(path.absolute()) for path in (folder / "config.yaml", folder))
    return Submission(event.job, str(run_dir), config, "", log, {}, sys.maxsize, event.time)


def submission_of(run_dir: Path) -> Submission:
    """Return the run's newest submission.

    Raises:
        UserError: There is none.
    """
    if (submission := newest_submission(run_dir)) is not None:
        return submission
    raise UserError(
        f"{run_dir} was not submitted with `{typed('slurm')}`, so it has no job; "
        f"`{typed('status', run_dir)}` shows its state"
    )


def settings_of(run_dir: Path) -> dict[str, Any]:
    """Return the newest submission's settings of the cluster.

    Raises:
        UserError: There is no submission, or its file is damaged.
    """
    if settings := submission_of(run_dir).cluster:
        return settings
    again = typed("slurm", "--config", run_dir / "config.yaml")
    raise UserError(
        f"the submission.json of {run_dir}'s last job is damaged, and so its settings are lost; "
        f"submit the run again with `{again}` and its flags"
    )


def _submissions(run_dir: Path) -> list[tuple[int, Path]]:
    folders = slurm_folder(run_dir).glob("submission-*")
    return [(int(number), f) for f in folders if (number := f.name.partition("-")[2]).isdigit()]


def note(run_dir: Path, event: JobEvent) -> None:
    """Add a line to the run's history."""
    slurm_folder(run_dir).mkdir(parents=True, exist_ok=True)
    with (slurm_folder(run_dir) / "history.jsonl").open("a") as file:
        file.write(json.dumps(asdict(event)) + "\n")


def history(run_dir: Path) -> list[JobEvent]:
    """Return all events, oldest first; a line torn by a kill is left out."""
    events: list[JobEvent] = []
    file = slurm_folder(run_dir) / "history.jsonl"
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            events.append(JobEvent(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return events


def since_submission(events: list[JobEvent]) -> list[JobEvent]:
    """Return the events of the newest submission."""
    starts = [i for i, event in enumerate(events) if event.kind == "submitted"]
    return events[starts[-1] :] if starts else events


def restarts(events: list[JobEvent]) -> list[JobEvent]:
    """Return all starts of the run except the first; their texts give the reason."""
    return [event for event in events if event.kind == "started"][1:]


def starts_in_vain(events: list[JobEvent], step: int) -> int:
    """Return how many of the newest submission's last starts began at this checkpoint's step."""
    starts = [event for event in since_submission(events) if event.kind == "started"]
    return len(list(itertools.takewhile(lambda start: start.step == step, reversed(starts))))


def reason_of_start(events: list[JobEvent], why_ended: Callable[[], str | None]) -> str:
    """Return why the job starts after these events; empty on the run's first start.

    Args:
        why_ended: Returns the reason by Slurm's accounting, if it has one; a query takes a while.
    """
    if not any(event.kind == "started" for event in events):
        return ""
    last = events[-1]
    match last.kind:
        case "submitted":
            return "submitted again"
        case "finished":
            return "started again after its end"
        case "started":
            return why_ended() or "ended for an unknown reason"
        case "failed":
            # The process may only have seen the loss of another, and Slurm knows the cause.
            return why_ended() or last.text
    # The stopped process recorded a guess.
    if "from outside" in last.text:
        account, name = why_ended(), last.text.partition(" ")[0]
        if account and (name == "SIGTERM" or account == "preempted"):
            return f"{account} ({name})"
    return last.text


def saved_step(run_dir: Path) -> int:
    """Return the newest checkpoint's step, by its name; 0 without one."""
    checkpoint = selection.last(run_dir / "checkpoints")
    return 0 if checkpoint is None else selection.step_and_repeat(checkpoint)[0]


def write_failure(log: Path, job: str, restart: int, rank: int, text: str) -> None:
    """Write a rank's error to a file, unless it already has one."""
    file = log / f"failure-{job}.{restart}-{rank}.txt"
    if not file.exists():
        write_text(file, f"{time.time():.6f}\n{text}\n")


def first_failure(log: Path, job: str, restart: int) -> str | None:
    """Return the error of the rank that failed first."""
    failures: list[tuple[float, str]] = []
    for file in log.glob(f"failure-{job}.{restart}-*.txt"):
        moment, _, text = file.read_text().partition("\n")
        failures.append((float(moment), text.rstrip("\n")))
    return min(failures)[1] if failures else None


@contextmanager
def submitting(run_dir: Path) -> Iterator[None]:
    """Lock a run, so that only one program at a time submits it; the next one waits."""
    folder = slurm_folder(run_dir)
    with explaining(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    with lock:
        flock(lock, LOCK_EX)
        yield
