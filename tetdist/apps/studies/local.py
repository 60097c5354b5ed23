"""The runs of a study on this machine, some side by side.

Every run is a call of the training command. Finished runs are left alone, others continue where
they were saved. No run outlives its study: one that is stopped ends them and waits for them to
save, and one that is killed is missed by them (tetdist/distributed/starters.py).
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from tetdist.apps.studies.plan import Command, StudyRun, evaluation, is_trained, lines
from tetdist.apps.studies.tracking import Parent, lacking_runs
from tetdist.distributed.signals import let_go_of_closed_streams
from tetdist.distributed.starters import as_starter
from tetdist.errors import UserError
from tetdist.storage.files import is_held
from tetdist.wording import counted

LOOK_EVERY = 0.2  # seconds between two looks at the processes
_AT_WORK = (
    "another process is at work in {}: wait for it, or stop it; the same command then goes on from "
    "there"
)


def work(runs: list[StudyRun], jobs: int, parent: Parent, *, again: bool = False) -> dict[str, str]:
    """Train and evaluate what is not done yet, some runs at a time.

    Args:
        runs: None before one that it needs.
        jobs: How many at a time.
        parent: The study's run in MLflow, which is told of those that are not trained.
        again: Start finished runs again instead, each of which sends MLflow what it lacks.

    Returns:
        The runs that failed, and why.

    Raises:
        KeyboardInterrupt: A signal asked for it; all that was under way is saved.
    """
    waiting = [run for run in runs if again or run.next_command() is not None]
    if jobs > 1:
        waiting = needed_first(waiting)
    progress = StudyProgress(len(runs), waiting)
    running: dict[StudyRun, Child] = {}
    failed: dict[str, str] = {}

    def fail(run: StudyRun, reason: str) -> None:
        failed[run.name] = reason
        progress.end(run, reason)

    def start(run: StudyRun, command: Command | None) -> None:
        assert command is not None
        try:
            running[run] = Child(run, jobs, command)
        except UserError as error:  # Somebody else was quicker.
            fail(run, str(error))

    with StopRequest() as stop, ended_at_exit(running, stop):
        while waiting or running:
            stop.check()
            for run in list(waiting):
                lost = [needed.name for needed in run.needs if needed.name in failed]
                if lost and not again:
                    waiting.remove(run)
                    fail(run, f"not started, because {lost[0]} failed")
                elif len(running) < jobs and (again or all(map(is_trained, run.needs))):
                    waiting.remove(run)
                    if not is_trained(run):
                        parent.tell(run, "SCHEDULED")
                    stop.check()
                    start(run, run.train_command if again else run.next_command())
            if (ended := first_to_end(running, stop)) is None:
                continue
            run = ended
            reason = running.pop(run).failure()
            if reason is not None:
                fail(run, reason)
                if not is_trained(run):
                    parent.tell(run, "FAILED")
            elif (more := run.next_command()) is not None:
                start(run, more)
            else:
                progress.end(run, outcome(run), finished=True)
    return failed


def catch_up(study: str, runs: Iterable[StudyRun], output: Path, jobs: int) -> None:
    """Send MLflow what it lacks of a study's finished runs, or say that it lacks it.

    The study's result does not depend on MLflow, so that a study which cannot send it has not
    failed.

    Args:
        study: Name of the study.
        runs: Its runs.
        output: Folder of the study.
        jobs: How many runs are started again at a time.

    Raises:
        KeyboardInterrupt: A signal asked for it; the same command sends the rest.
    """
    tracked = [run for run in runs if run.config.tracking_uri is not None]
    if tracked:
        _say("asking MLflow which runs it lacks points of")
    try:
        lacking, untagged = lacking_runs(tracked)
        parent = Parent(study, lacking + untagged, output)
        if lacking:
            _say(f"MLflow lacks points of {_named(lacking)}: sending them")
            work(lacking, jobs, parent, again=True)
        for run in lacking + untagged:
            parent.tell(run, None)
        if lacking and (left := lacking_runs(lacking)[0]):
            raise UserError(f"MLflow still lacks points of {_named(left)}; see {left[0].log}")
    except UserError as error:
        _say(
            f"{error}. The runs' metrics.jsonl have all points, and the same command sends MLflow "
            "those that it lacks"
        )


def _named(runs: list[StudyRun]) -> str:
    return f"{counted(len(runs), 'run')} ({', '.join(run.name for run in runs)})"


def needed_first(runs: list[StudyRun]) -> list[StudyRun]:
    """Put runs that others wait for, to begin with or learn from, in front: longest chains first.

    In the order of seeds one core would be left with the last seed's chain while others are idle.

    Args:
        runs: None before one that it needs; nor are they in the result.
    """
    after = dict.fromkeys(runs, 0)  # the size of the longest chain of runs that waits for each
    for run in reversed(runs):
        for needed in run.needs:
            if needed in after:
                after[needed] = max(after[needed], run.size + after[run])
    return sorted(runs, key=lambda run: -after[run])


def refuse_if_at_work(runs: list[StudyRun]) -> None:
    """Refuse to start beside another process that trains or evaluates one of the runs.

    Raises:
        UserError: There is one; the text says where.
    """
    for run in runs:
        # The log is held by what this command has started, the other file by whatever trains there.
        if is_held(run.log) or is_held(run.folder / ".lock"):
            raise UserError(_AT_WORK.format(run.folder))


class Child:
    """A process that trains or evaluates a run; what it prints goes to the run's log.

    Raises:
        UserError: Another process is at work on the run.
    """

    def __init__(self, run: StudyRun, jobs: int, command: Command) -> None:
        self.run, self.command = run, command
        run.log.parent.mkdir(parents=True, exist_ok=True)
        threads = max(1, len(os.sched_getaffinity(0)) // jobs)
        with run.log.open("ab") as log:
            # The process has the lock together with its output, so that it holds it to its end,
            # also where this one is killed.
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(_AT_WORK.format(run.folder)) from error
            except OSError:
                pass  # There are file systems without locks.
            self.said_before = log.tell()
            self.process = subprocess.Popen(
                self.command.words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Out of reach of the terminal's Ctrl-C, which is passed on once, as SIGTERM.
                start_new_session=True,
                env={"OMP_NUM_THREADS": str(threads)} | os.environ | as_starter(),
            )

    def failure(self) -> str | None:
        """The reason why it ended without having done its work; None if it has done it."""
        status = self.process.returncode
        if status == 0 and self.run.next_command() != self.command:
            return None
        if status == 0 and self.command == self.run.train_command:
            folder = self.run.folder
            return f"{folder / 'metrics.jsonl'} lacks evaluations; remove {folder} to train it anew"
        with self.run.log.open("rb") as log:
            log.seek(self.said_before)
            text = log.read().decode(errors="replace")
        said = [line for line in text.splitlines() if line]
        return f"exit status {status}: {said[-1] if said else 'it said nothing'} ({self.run.log})"


class StopRequest:
    """A request to end, by Ctrl-C, SIGTERM or a terminal that closes; obeyed when asked for.

    An exception out of the middle of a start would leave a process that nobody knows of. Where
    SIGHUP is ignored, as under nohup, it stays so.

    Attributes:
        came: Whether it was made.
        at_once: Whether a Ctrl-C came after it, which means: without saving.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.came = self.at_once = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in self.SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        let_go_of_closed_streams()
        self.at_once |= self.came and number == signal.SIGINT
        self.came = True

    def check(self) -> None:
        """Raise KeyboardInterrupt if it was made."""
        if self.came:
            raise KeyboardInterrupt


@contextlib.contextmanager
def ended_at_exit(running: dict[StudyRun, "Child"], stop: StopRequest) -> Iterator[None]:
    """Leave no child behind, whatever happens: each saves and ends."""
    try:
        yield
    finally:
        for child in running.values():
            child.process.terminate()
        while any(child.process.poll() is None for child in running.values()):
            if stop.at_once:
                for child in running.values():
                    child.process.kill()
            time.sleep(LOOK_EVERY / 4)


def first_to_end(running: dict[StudyRun, "Child"], stop: StopRequest) -> StudyRun | None:
    """Wait until a process ends, or a signal comes; None if there is none, or a signal came."""
    while running and not stop.came:
        for run, child in running.items():
            if child.process.poll() is not None:
                return run
        time.sleep(LOOK_EVERY)
    return None


def outcome(run: StudyRun) -> str:
    if run.is_judged_apart:
        found = evaluation(run)
        assert found is not None  # A run without one is not at its end.
        return f"top-1 {found['top1']:.2f} %"
    last = lines(run, "val")[-1]
    return f"top-1 {last['top1']:.2f} %, best {last['best_top1']:.2f} %"


class StudyProgress:
    """Runs done, and the time left: a line a run.

    Args:
        total: Number of runs, also of those that were done before.
        left: Those to do.
    """

    def __init__(self, total: int, left: Iterable[StudyRun]) -> None:
        self.total, self.left = total, list(left)
        self.begun, self.size = time.monotonic(), 0  # the size of those that are finished
        if len(self.left) < total:
            _say(f"{total - len(self.left)} of {total} runs are done already")

    def end(self, run: StudyRun, text: str, *, finished: bool = False) -> None:
        """Say how a run ended, and how much time is left, by the sizes of runs."""
        self.left.remove(run)
        self.size += run.size if finished else 0
        if self.left and self.size:
            pace = (time.monotonic() - self.begun) / self.size
            text += f"; about {pace * sum(run.size for run in self.left) / 60:.0f} min left"
        _say(f"[{self.total - len(self.left)}/{self.total}] {run.name}: {text}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
