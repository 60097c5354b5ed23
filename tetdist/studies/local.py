"""The runs of a study on this machine, some side by side.

Every run is a call of the training command. Finished runs are left alone, others continue where
they were saved.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tetdist.studies.plan import Command, StudyRun
    from tetdist.studies.tracking import Parent

LOOK_EVERY = 0.2  # seconds between two looks at the processes


# --- on this machine ------------------------------------------------------------------------------


def work(runs: "list[StudyRun]", jobs: int, parent: "Parent") -> dict[str, str]:
    """Train and evaluate what is not done yet, some runs at a time.

    Returns:
        The runs that failed, and why.
    """
    from tetdist.studies.plan import is_trained

    waiting = [run for run in runs if run.next_command() is not None]
    progress = StudyProgress(len(runs), len(waiting))
    running: dict[StudyRun, Child] = {}
    failed: dict[str, str] = {}
    with progress, ended_at_exit(running):
        while waiting or running:
            for run in list(waiting):
                lost = [needed.name for needed in run.needs if needed.name in failed]
                if lost:
                    waiting.remove(run)
                    failed[run.name] = f"not started, because {lost[0]} failed"
                    progress.end(f"{run.name}: {failed[run.name]}")
                elif len(running) < jobs and all(map(is_trained, run.needs)):
                    waiting.remove(run)
                    if not is_trained(run):
                        parent.tell(run, "SCHEDULED")
                    running[run] = Child(run, jobs)
            ended = first_to_end(running)
            if ended is None:
                continue
            run = ended
            child = running.pop(run)
            reason = child.failure()
            if reason is None and (more := run.next_command()) is not None:
                running[run] = Child(run, jobs, more)
                continue
            if reason is not None:
                failed[run.name] = reason
                if not is_trained(run):
                    parent.tell(run, "FAILED")
            progress.end(f"{run.name}: {reason or outcome(run)}")
    return failed


class Child:
    """A process that trains or evaluates a run; what it prints goes to the run's log."""

    def __init__(self, run: "StudyRun", jobs: int, command: "Command | None" = None) -> None:
        self.run = run
        self.command = command or run.next_command()
        assert self.command is not None
        run.log.parent.mkdir(parents=True, exist_ok=True)
        threads = max(1, len(os.sched_getaffinity(0)) // jobs)
        with run.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command.words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Out of reach of the terminal's Ctrl-C, which is passed on once, as SIGTERM.
                start_new_session=True,
                env={"OMP_NUM_THREADS": str(threads)} | os.environ,
            )

    def failure(self) -> str | None:
        """The reason why it ended without having done its work; None if it has done it."""
        status = self.process.returncode
        if status == 0 and self.run.next_command() != self.command:
            return None
        if status == 0 and self.command == self.run.train_command:
            folder = self.run.folder
            return f"{folder / 'metrics.jsonl'} lacks evaluations; remove {folder} to train it anew"
        said = [line for line in self.run.log.read_text(errors="replace").splitlines() if line]
        return f"exit status {status}: {said[-1] if said else 'it said nothing'} ({self.run.log})"


@contextmanager
def ended_at_exit(running: "dict[StudyRun, Child]") -> Iterator[None]:
    """Leave no child behind, whatever happens: each saves and ends."""
    # SIGTERM, from a batch system or `kill`, stops a study as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        children = [child.process for child in running.values()]
        try:
            for process in children:
                process.terminate()
            for process in children:
                process.wait()
        except KeyboardInterrupt:  # A second Ctrl-C means: at once.
            for process in children:
                process.kill()
            raise


def first_to_end(running: "dict[StudyRun, Child]") -> "StudyRun | None":
    """Wait until a process ends; None if there is none."""
    while running:
        for run, child in running.items():
            if child.process.poll() is not None:
                return run
        time.sleep(LOOK_EVERY)
    return None


def outcome(run: "StudyRun") -> str:
    from tetdist.studies.plan import lines

    last = lines(run, "val")[-1]
    return f"top-1 {last['top1']:.2f} %, best {last['best_top1']:.2f} %"


class StudyProgress:
    """Runs done, with rate and time left: a bar on a terminal, a line a run elsewhere."""

    def __init__(self, total: int, left: int) -> None:
        from tqdm import tqdm

        self.total, self.left, self.done_here = total, left, 0
        self.started = time.monotonic()
        self.on_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=total,
            initial=total - left,
            unit="run",
            dynamic_ncols=True,
            disable=not self.on_terminal,
        )
        if left < total:
            self.say(f"{total - left} of {total} runs are done already")

    def __enter__(self) -> "StudyProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def end(self, text: str) -> None:
        self.left -= 1
        self.done_here += 1
        self.bar.update()
        seconds = (time.monotonic() - self.started) / self.done_here * self.left
        eta = f"; about {seconds / 60:.0f} min left" if self.left and not self.on_terminal else ""
        self.say(f"[{self.total - self.left}/{self.total}] {text}{eta}")

    def say(self, text: str) -> None:
        self.bar.write(text, file=sys.stderr)
        sys.stderr.flush()
