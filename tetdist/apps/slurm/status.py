"""State of a run across all its starts: progress, events, its log."""

import itertools
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from tetdist.apps.slurm import history, jobs
from tetdist.apps.slurm.history import JobEvent, Submission
from tetdist.apps.slurm.jobs import State
from tetdist.errors import UserError, typed
from tetdist.tracking.metrics_file import from_end
from tetdist.tracking.progress import slowest_rank
from tetdist.wording import duration, rate

QUERY_EVERY = 5.0  # seconds between two queries to Slurm, which serves many users
READ_EVERY = 0.5  # seconds between two reads of a log


def find(name: str, runs_dir: str = "runs") -> list[Path]:
    """Return the folder of a run, or of all runs of a sweep, by path or by name in runs/."""
    for path in (Path(name), Path(runs_dir) / name):
        if history.newest_submission(path) is not None:
            return [path]
        # The folders of some runs of a sweep may have been removed.
        swept = [run for run in history.newest_sweep(path) if history.newest_submission(run)]
        if swept:
            return swept
    if Path(name).is_dir():
        raise UserError(
            f"{name} has no slurm/ folder, so it was not submitted with `{typed('slurm')}`"
        )
    raise UserError(f"there is no run {name}; give a run folder or a name in {runs_dir}/")


def submission_of(run_dir: Path) -> Submission:
    submission = history.newest_submission(run_dir)
    assert submission is not None, "find() checks it"
    return submission


def describe(run_dir: Path) -> str:
    """Return the state of the run as text."""
    submission = submission_of(run_dir)
    local = State("local", "without Slurm", False)
    state = local if submission.job == history.LOCAL else jobs.state_of(submission)
    events = history.history(run_dir)
    lines = [f"{run_dir}: job {submission.job} {state.name} ({state.text})"]
    lines.append("  " + progress(run_dir, submission, state))
    more = slowest_rank(next(_trained(run_dir), {})) + goodput(run_dir, submission, events)
    lines += [f"  {text}" for text in more]
    if submission.after and state.name == "PENDING":
        lines.append(f"  after     {', '.join(submission.after)}")
    again = history.restarts(events)
    lines.append(f"  restarts  {len(again) or 'none'}")
    lines += [
        f"    {datetime.fromtimestamp(e.time):%Y-%m-%d %H:%M:%S}  from step {e.step}: {e.text}"
        for e in again
    ]
    lines.append(f"  log       {submission.log_file}")
    failure = failure_of(events, submission)
    if failure and not state.is_queued:
        lines.append(f"  failed    {failure}".replace("\n", "\n    "))
    return "\n".join(lines)


def progress(run_dir: Path, submission: Submission, state: State) -> str:
    """Return the last step, the rate and the remaining time as text."""
    last, saved = next(_trained(run_dir), None), history.saved_step(run_dir)
    if last is None:
        return f"no step of {submission.last_step} is logged yet; saved at step {saved}"
    step = int(last["step"])
    parts = [
        f"step {step} of {submission.last_step} ({100 * step / submission.last_step:.1f} %)",
        f"epoch {last['epoch']:.2f}",
        f"loss {last['loss']:.3f}",
        rate(last["samples_per_s"]),
        f"saved at step {saved}",
    ]
    if state.is_queued and step < submission.last_step and "eta_s" in last:
        parts.append(f"ETA {timedelta(seconds=round(last['eta_s']))} of training")
    return ", ".join(parts)


def goodput(run_dir: Path, submission: Submission, events: list[JobEvent]) -> list[str]:
    """Describe how much of the time since the submission steps took; repeated ones count once."""
    in_steps, later = 0.0, None
    for line in itertools.chain(_trained(run_dir), [{"step": 0, "time": 0.0}]):
        if later is not None:
            steps = later["step"] - line["step"]
            in_steps += steps * submission.global_batch / later["samples_per_s"]
        if line["time"] < submission.time:
            break
        later = line
    if later is None:
        return []
    has_ended = bool(events) and events[-1].kind in ("finished", "failed", "cancelled")
    seconds = (events[-1].time if has_ended else time.time()) - submission.time
    return [
        f"goodput   {100 * in_steps / seconds:.0f} % ({duration(in_steps)} in steps, of "
        f"{duration(seconds)} since the submission)"
    ]


def _trained(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of training, the last one first."""
    metrics = run_dir / "metrics.jsonl"
    lines = from_end(metrics) if metrics.exists() else ()
    return (line for line in lines if line["kind"] == "train")


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


def follow(run_dir: Path) -> int:
    """Print the growing log and changes of state until the job has left the queue.

    Returns:
        Exit status: 0 if the run is finished, else 1.

    Raises:
        KeyboardInterrupt: The user pressed Ctrl-C; the job continues.
    """
    submission = submission_of(run_dir)
    log, position = submission.log_file, 0
    shown, queried = "", -QUERY_EVERY
    state = State("", "", True)
    while state.is_queued:
        if time.monotonic() - queried >= QUERY_EVERY:
            state, queried = jobs.state_of(submission), time.monotonic()
            if state.name != shown:
                print(f"--- job {submission.job} is {state.name} ({state.text})")
                shown = state.name
        position = _show_new(log, position)
        if state.is_queued:
            sys.stdout.flush()
            time.sleep(READ_EVERY)
    _show_new(log, position)
    print(describe(run_dir))
    return 0 if is_finished(run_dir) else 1


def is_finished(run_dir: Path) -> bool:
    return [event.kind for event in history.history(run_dir)][-1:] == ["finished"]


def _show_new(log: Path, position: int) -> int:
    """Print a log from ``position`` on, and return its end."""
    if not log.exists():
        return position
    with log.open("rb") as file:
        file.seek(position)
        data = file.read()
    print(data.decode(errors="replace"), end="")
    return position + len(data)
