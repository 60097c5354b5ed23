"""Runs of a study on this machine, optionally several at once.

Every run is a call of the training command. Finished runs are skipped, others resume at their last
checkpoint. No run outlives its study: a stopped study stops its runs and waits until they have
saved, and the runs notice when it is killed (tetdist/distributed/starters.py).
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

from tetdist.apps.studies.plan import Command, StudyRun, evaluation, is_trained, lines
from tetdist.apps.studies.tracking import Parent, lacking_runs
from tetdist.distributed.signals import handling, let_go_of_closed_streams
from tetdist.distributed.starters import as_starter
from tetdist.errors import UserError
from tetdist.storage.files import is_held
from tetdist.wording import counted

POLL_EVERY = 0.2  # seconds between two polls of the processes
_IN_USE = "another process is using {}; wait for it or stop it, and run the same command again"


def work(runs: list[StudyRun], jobs: int, parent: Parent, *, again: bool = False) -> dict[str, str]:
    """Train and evaluate the unfinished runs, several at a time; return why each failed run failed.

    Each run comes after those that it needs. With ``again``, finished runs are restarted instead,
    and each sends MLflow its missing points.

    Raises:
        KeyboardInterrupt: A signal stopped the study; all runs in progress have saved.
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
        except UserError as error:  # Another process was faster.
            fail(run, str(error))

    stop = StopRequest()
    with handling(StopRequest.SIGNALS, stop.receive), ended_at_exit(running, stop):
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
                        parent.announce(run, "SCHEDULED")
                    stop.check()
                    start(run, run.train_command if again else run.next_command())
            if (ended := first_to_end(running, stop)) is None:
                continue
            run = ended
            reason = running.pop(run).failure()
            if reason is not None:
                fail(run, reason)
                if not is_trained(run):
                    parent.announce(run, "FAILED")
            elif (more := run.next_command()) is not None:
                start(run, more)
            else:
                progress.end(run, outcome(run), finished=True)
    return failed


def catch_up(study: str, runs: Iterable[StudyRun], output: Path, jobs: int) -> None:
    """Send MLflow the missing points of a study's finished runs, or warn if that fails.

    The study's result does not depend on MLflow, so a failure to send does not fail the study.

    Raises:
        KeyboardInterrupt: A signal stopped it; the same command sends the rest.
    """
    tracked = [run for run in runs if run.config.tracking_uri is not None]
    if tracked:
        _print("checking whether MLflow has all points of all runs")
    try:
        lacking, untagged = lacking_runs(tracked)
        parent = Parent(study, lacking + untagged, output)
        if lacking:
            _print(f"MLflow lacks points of {_named(lacking)}: sending them")
            work(lacking, jobs, parent, again=True)
        for run in lacking + untagged:
            parent.announce(run, None)
        if lacking and (left := lacking_runs(lacking)[0]):
            raise UserError(f"MLflow still lacks points of {_named(left)}; see {left[0].log}")
    except UserError as error:
        _print(
            f"{error}. The runs' metrics.jsonl have all points; the same command sends MLflow the "
            "missing ones"
        )


def _named(runs: list[StudyRun]) -> str:
    return f"{counted(len(runs), 'run')} ({', '.join(run.name for run in runs)})"


def needed_first(runs: list[StudyRun]) -> list[StudyRun]:
    """Sort runs so that those which others need (init, teacher) come first, longest chains first.

    In the order of seeds, one core would end with the last seed's chain while others are idle.
    """
    after = dict.fromkeys(runs, 0.0)  # the size of the longest chain of runs that waits for each
    for run in reversed(runs):
        for needed in run.needs:
            if needed in after:
                after[needed] = max(after[needed], run.size + after[run])
    return sorted(runs, key=lambda run: -after[run])


def refuse_if_at_work(runs: list[StudyRun]) -> None:
    """Refuse to start while another process trains or evaluates one of the runs."""
    for run in runs:
        # A study's process locks the log; any training process locks the other file.
        if is_held(run.log) or is_held(run.folder / ".lock"):
            raise UserError(_IN_USE.format(run.folder))


class Child:
    """Process that trains or evaluates a run, with its output in the run's log."""

    def __init__(self, run: StudyRun, jobs: int, command: Command) -> None:
        self.run, self.command = run, command
        run.log.parent.mkdir(parents=True, exist_ok=True)
        threads = max(1, len(os.sched_getaffinity(0)) // jobs)
        with run.log.open("ab") as log:
            # The child inherits the lock with its output, so it holds it until it ends, even if
            # this process is killed.
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(_IN_USE.format(run.folder)) from error
            except OSError:
                pass  # Some file systems have no locks.
            self.log_start = log.tell()
            self.process = subprocess.Popen(
                self.command.words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Shield it from the terminal's Ctrl-C, which is forwarded once, as SIGTERM.
                start_new_session=True,
                env={"OMP_NUM_THREADS": str(threads)} | os.environ | as_starter(),
            )

    def failure(self) -> str | None:
        """Return why the process failed; None if it succeeded."""
        status = self.process.returncode
        if status == 0 and self.run.next_command() != self.command:
            return None
        if status == 0 and self.command == self.run.train_command:
            folder = self.run.folder
            return f"{folder / 'metrics.jsonl'} lacks evaluations; remove {folder} to retrain it"
        with self.run.log.open("rb") as log:
            log.seek(self.log_start)
            text = log.read().decode(errors="replace")
        printed = [line for line in text.splitlines() if line]
        return f"exit status {status}: {printed[-1] if printed else 'no output'} ({self.run.log})"


class StopRequest:
    """Request to stop, by Ctrl-C, SIGTERM or a closing terminal; takes effect in `check`.

    An exception in the middle of a start would leave an unknown process behind.

    Attributes:
        at_once: True after a further Ctrl-C, which stops the runs without saving.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    came = at_once = False

    def receive(self, number: int, _frame: FrameType | None) -> None:
        let_go_of_closed_streams()
        self.at_once |= self.came and number == signal.SIGINT
        self.came = True

    def check(self) -> None:
        """Raise KeyboardInterrupt after the request."""
        if self.came:
            raise KeyboardInterrupt


@contextlib.contextmanager
def ended_at_exit(running: dict[StudyRun, "Child"], stop: StopRequest) -> Iterator[None]:
    """Stop all children on exit, whatever happens; each saves and ends."""
    try:
        yield
    finally:
        for child in running.values():
            child.process.terminate()
        while any(child.process.poll() is None for child in running.values()):
            if stop.at_once:
                for child in running.values():
                    child.process.kill()
            time.sleep(POLL_EVERY / 4)


def first_to_end(running: dict[StudyRun, "Child"], stop: StopRequest) -> StudyRun | None:
    """Wait for a process to end; return its run, or None without processes or after a signal."""
    while running and not stop.came:
        for run, child in running.items():
            if child.process.poll() is not None:
                return run
        time.sleep(POLL_EVERY)
    return None


def outcome(run: StudyRun) -> str:
    if run.is_judged_apart:
        found = evaluation(run)
        assert found is not None  # A finished run has one.
        return f"top-1 {found['top1']:.2f} %"
    last = lines(run, "val")[-1]
    return f"top-1 {last['top1']:.2f} %, best {last['best_top1']:.2f} %"


class StudyProgress:
    """Progress of a study: prints a line for each run, with the time left."""

    def __init__(self, total: int, left: Iterable[StudyRun]) -> None:
        self.total, self.left = total, list(left)
        self.begun, self.size = time.monotonic(), 0.0  # total size of the finished runs
        if len(self.left) < total:
            _print(f"{total - len(self.left)} of {total} runs are already done")

    def end(self, run: StudyRun, text: str, *, finished: bool = False) -> None:
        """Print how a run ended, and the time left, estimated by the sizes of the runs."""
        self.left.remove(run)
        self.size += run.size if finished else 0
        if self.left and self.size:
            pace = (time.monotonic() - self.begun) / self.size
            text += f"; about {pace * sum(run.size for run in self.left) / 60:.0f} min left"
        _print(f"[{self.total - len(self.left)}/{self.total}] {run.name}: {text}")


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
