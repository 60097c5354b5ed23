"""Runs of a study on this machine, optionally several at once.

Every run is a call of the training command. Finished runs are skipped, others resume at their last
checkpoint. No run outlives its study: a stopped study stops its runs and waits until they have
saved, and the runs notice when it is killed (tetdist/distributed/starters.py).
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
from tetdist.distributed.signals import StopRequest
from tetdist.distributed.starters import as_starter
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
    waiting = [run for run in runs if run.next_command() is not None]
    running: dict[StudyRun, Child] = {}
    failed: dict[str, str] = {}
    done = before = len(runs) - len(waiting)
    began = time.monotonic()
    logs = runs[0].log.parent
    with explaining(logs):
        logs.mkdir(parents=True, exist_ok=True)
    _print(
        f"{done} of {len(runs)} runs are already done; logs are in {logs}, and "
        f"`{typed('status', logs.parent)}` shows the state of all"
    )

    def end(run: StudyRun, text: str) -> None:
        nonlocal done
        done += 1
        half, spent = len(running) / 2, time.monotonic() - began  # of the work in progress
        seconds = spent / (done - before + half) * (len(runs) - done - half)
        left = f", about {duration(seconds)} left" if done < len(runs) else ""
        _print(f"[{done}/{len(runs)}] {run.name}: {text}; {duration(spent)} so far{left}")

    def fail(run: StudyRun, reason: str) -> None:
        failed[run.name] = reason
        end(run, reason)

    def start(run: StudyRun, command: Command | None) -> None:
        assert command is not None
        try:
            used = [child.place for child in running.values()]
            running[run] = Child(run, jobs, command, min(gpu_places(), key=used.count))
        except UserError as error:  # Another process was faster.
            fail(run, str(error))

    with StopRequest(ALONE) as stop, ended_at_exit(running):
        while waiting or running:
            for run in list(waiting):
                if stop.agreed():
                    raise KeyboardInterrupt
                lost = [needed.name for needed in run.needs if needed.name in failed]
                if lost:
                    waiting.remove(run)
                    fail(run, f"not started, because {lost[0]} failed")
                elif len(running) < jobs and all(map(is_trained, run.needs)):
                    waiting.remove(run)
                    start(run, run.next_command())
            ended = [run for run, child in running.items() if child.process.poll() is not None]
            for run in ended:
                reason = running.pop(run).failure()
                if reason is not None:
                    fail(run, reason)
                elif (found := evaluation(run)) is None:
                    start(run, run.eval_command)
                else:
                    end(run, f"top-1 {found['top1']:.2f} %")
            if stop.agreed():
                raise KeyboardInterrupt
            if not ended:
                time.sleep(POLL_EVERY)
    return failed


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
                env={"OMP_NUM_THREADS": str(threads)} | os.environ | place | as_starter(),
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


@contextlib.contextmanager
def ended_at_exit(running: dict[StudyRun, "Child"]) -> Iterator[None]:
    """Stop all children on exit, whatever happens; each saves and ends.

    A second Ctrl-C meanwhile kills them.
    """
    try:
        yield
    finally:
        try:
            for child in running.values():
                child.process.terminate()
            for child in running.values():
                child.process.wait()
        except KeyboardInterrupt:
            for child in running.values():
                child.process.kill()
                child.process.wait()
            raise


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
