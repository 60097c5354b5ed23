"""Runs of a study on this machine, optionally several at once.

Every run is a call of the training command. Finished runs are skipped, others resume at their last
checkpoint. No run outlives its study: a stopped study stops its runs and waits until they have
saved, and the runs notice when it is killed (tetdist/distributed/launchers.py).
"""

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import torch

from tetdist.apps.studies.plan import Command, StudyRun, evaluation, is_trained
from tetdist.distributed.launchers import as_launcher
from tetdist.distributed.signals import StopRequest
from tetdist.distributed.world import ALONE
from tetdist.errors import UserError, typed
from tetdist.storage.files import explaining, is_held
from tetdist.wording import duration

POLL_EVERY = 0.2  # seconds between two polls of the processes
_IN_USE = "another process is using {}; wait for it or stop it, and run the same command again"


def work(runs: list[StudyRun], jobs: int) -> dict[str, str]:
    """Train and evaluate the unfinished runs, several at a time; return why each failed run failed.

    Each run comes after those that it needs.

    Raises:
        KeyboardInterrupt: A signal stopped the study; all runs in progress have saved.
    """
    work = _Work(runs, jobs)
    logs = runs[0].log.parent
    with explaining(logs):
        logs.mkdir(parents=True, exist_ok=True)
    _print(
        f"{work.done} of {len(runs)} runs are already done; logs are in {logs}, and "
        f"`{typed('status', logs.parent)}` shows the state of all"
    )
    with StopRequest(ALONE) as stop, ended_at_exit(work.running, stop):
        while work.waiting or work.running:
            for run in list(work.waiting):
                if stop.agreed():
                    raise KeyboardInterrupt
                work.start_if_possible(run)
            ended = [run for run, child in work.running.items() if child.has_ended]
            for run in ended:
                work.go_on(run)
            if stop.agreed():
                raise KeyboardInterrupt
            if not ended:
                time.sleep(POLL_EVERY)
    return work.failed


class _Work:
    """Runs of a study: those that wait, the processes of those in progress, and the failed ones."""

    def __init__(self, runs: list[StudyRun], jobs: int) -> None:
        self.number, self.jobs = len(runs), jobs
        self.waiting = [run for run in runs if run.next_command() is not None]
        self.running: dict[StudyRun, Child] = {}
        self.failed: dict[str, str] = {}
        self.began, self.done_before = time.monotonic(), self.done

    @property
    def done(self) -> int:
        """Number of runs that are finished or have failed."""
        return self.number - len(self.waiting) - len(self.running)

    def start_if_possible(self, run: StudyRun) -> None:
        """Start a waiting run if there is room and all that it needs is trained."""
        lost = [needed.name for needed in run.needs if needed.name in self.failed]
        if lost:
            self.waiting.remove(run)
            self._fail(run, f"not started, because {lost[0]} failed")
        elif len(self.running) < self.jobs and all(map(is_trained, run.needs)):
            self.waiting.remove(run)
            self._start(run, run.next_command())

    def go_on(self, run: StudyRun) -> None:
        """Evaluate a run whose training has ended, or report what it has reached."""
        reason = self.running.pop(run).failure()
        if reason is not None:
            self._fail(run, reason)
        elif (result := evaluation(run)) is None:
            self._start(run, run.eval_command)
        else:
            self._report(run, f"top-1 {result['top1']:.2f} %")

    def _start(self, run: StudyRun, command: Command | None) -> None:
        assert command is not None
        used = [child.place for child in self.running.values()]
        try:
            self.running[run] = Child(run, self.jobs, command, min(gpu_places(), key=used.count))
        except UserError as error:  # Another process was faster.
            self._fail(run, str(error))

    def _fail(self, run: StudyRun, reason: str) -> None:
        self.failed[run.name] = reason
        self._report(run, reason)

    def _report(self, run: StudyRun, text: str) -> None:
        half, spent = len(self.running) / 2, time.monotonic() - self.began  # of what is in progress
        left, made = self.number - self.done - half, self.done - self.done_before + half
        end = f", about {duration(spent / made * left)} left" if self.done < self.number else ""
        progress = f"[{self.done}/{self.number}]"
        _print(f"{progress} {run.name}: {text}; {duration(spent)} so far{end}")


def gpu_places() -> list[dict[str, str]]:
    """Return the environment of a run on each visible GPU; without GPUs, an empty one."""
    count = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names.split(",")[:count]] or [{}]


def refuse_if_at_work(runs: list[StudyRun]) -> None:
    """Refuse to start while another process trains or evaluates one of the runs."""
    for run in runs:
        # A study's process locks the log; any training process locks the other file.
        if is_held(run.log) or is_held(run.folder / ".lock"):
            raise UserError(_IN_USE.format(run.folder))


class Child:
    """Process that trains or evaluates a run on its GPU, with its output in the run's log."""

    def __init__(self, run: StudyRun, jobs: int, command: Command, place: dict[str, str]) -> None:
        self.run, self.command, self.place = run, command, place
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
                env={"OMP_NUM_THREADS": str(threads)} | os.environ | place | as_launcher(),
            )

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

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


@contextlib.contextmanager
def ended_at_exit(running: dict[StudyRun, Child], stop: StopRequest) -> Iterator[None]:
    """Stop all children on exit, whatever happens; each saves and ends.

    A second Ctrl-C kills them.
    """

    def kill() -> None:
        for child in running.values():
            child.process.kill()

    stop.before_end.append(kill)
    try:
        yield
    finally:
        for child in running.values():
            child.process.terminate()
        for child in running.values():
            child.process.wait()


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
