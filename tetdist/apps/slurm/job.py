"""Work of each process of a job: join the others, train, and requeue the job until it is finished.

A job only knows its run folder. So all its starts are the same, whether it is the first, a requeue
by the job itself or an administrator, or a start after a preemption or a node's crash: training
resumes at the newest complete checkpoint.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

# Set before importing torch, which reads it: see tetdist_command.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tetdist.apps.slurm import history
from tetdist.apps.slurm.history import EventKind, JobEvent
from tetdist.apps.slurm.placement import Context
from tetdist.errors import PEER_FAILED, PeerFailed, UserError, sentence, typed
from tetdist.tracking.mlflow_logger import announce

if TYPE_CHECKING:
    from tetdist.config.schema import RunConfig

# Slurm warns of a time limit or a preemption by USR2; a user may send USR1 for the same effect.
# After either, the job requeues itself. SIGTERM means that Slurm has decided what comes next: the
# job only saves.
RESTART_AFTER = (signal.SIGUSR1, signal.SIGUSR2)

# Seconds within which Slurm should notice a crashed node. Slurm's own limit is SlurmdTimeout, by
# default 300.
NODE_PATIENCE = 1200.0

MISTAKES = (UserError, ModuleNotFoundError)


@dataclass(frozen=True)
class Job:
    """Run on a cluster; pickled by submitit, called in each process."""

    run_dir: str
    config: str  # file
    code: str  # folder from which the code must be imported
    log: str  # folder of the failures
    give_up_after: int  # see `ClusterSection`
    warn_before_end: int

    def __call__(self) -> None:
        """Run as a task of Slurm, and exit the process."""
        # A signal must stay pending until the trainer handles it, and have no effect after the
        # trainer is done. submitit's own handlers are for functions that cannot stop by
        # themselves: they would end the job too early, or keep it from ending.
        signal.pthread_sigmask(signal.SIG_BLOCK, RESTART_AFTER)
        for number in RESTART_AFTER:
            signal.signal(number, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGCONT):
            signal.signal(number, signal.SIG_DFL)
        sys.exit(Start(self, Context.find(self.warn_before_end)).run())


class Start:
    """Start of a job, in one process.

    Attributes:
        is_first: True for the process that writes the history: rank 0, or rank 1 after its death.
        config: Configuration of the run; None until it is loaded.
    """

    def __init__(self, job: Job, context: Context) -> None:
        self.job, self.context = job, context
        self.run_dir, self.log = Path(job.run_dir), Path(job.log)
        self.is_first = context.rank == 0
        self.config: RunConfig | None = None

    def run(self) -> int:
        """Run this process's part, and return its exit status."""
        level = logging.INFO if self.is_first else logging.ERROR
        logging.basicConfig(level=level, format="%(message)s", force=True)
        events = history.since_submission(history.history(self.run_dir))
        if any(event.kind == "cancelled" for event in events):
            # A requeue at that moment has undone it. This is not a success: another run may be
            # waiting for this one to finish.
            return 128 + signal.SIGTERM
        try:
            status = self._train()
        except MISTAKES as error:
            self._print(f"error: {sentence(error)}")
            self._write_failure(error)
            return self._fail(2, str(error))
        except PeerFailed as error:
            # `_record_failure` has recorded it; no tracker exists yet that would update MLflow.
            self._print(f"error: {error}")
            self._announce("FAILED")
            return PEER_FAILED
        except SystemExit as ended:
            return self._fail(int(ended.code or 0), "see the log of another process")
        except Exception as error:
            self._print(traceback.format_exc())
            self._write_failure(error)
            self._show_first_failure()
            return self._fail(1, f"{type(error).__name__}: {error}".splitlines()[0])
        return self._end(status)

    def _train(self) -> int:
        # The submitted code must run, whatever the environment has installed.
        here = Path(__file__).resolve().parents[3]
        if here != Path(self.job.code).resolve():
            raise UserError(
                f"the job was submitted with the code in {self.job.code}, but Python imports "
                f"{here}; keep the commands of cluster.setup from changing PYTHONPATH"
            )
        from tetdist.apps.reports.observers import observers
        from tetdist.config import loading
        from tetdist.training.run import train
        from tetdist.training.run_record import Launcher

        self.config = loading.load_written(Path(self.job.config))
        launcher = Launcher(
            tags=self._begin() if self.is_first else {},
            restarts_after=RESTART_AFTER,
            on_failure=self._record_failure,
        )
        return train(self.config, observers, launcher)

    def _begin(self) -> dict[str, str]:
        """Record this start, refuse it after too many in vain, and return tags for MLflow."""
        step, earlier = history.saved_step(self.run_dir), history.history(self.run_dir)
        why = history.reason_of_start(earlier, self.context.why_ended)
        hosts = ", ".join(self.context.hosts)
        self._note("started", f"{why}; on {hosts}" if why else "")
        vain = history.starts_in_vain(earlier, step)
        if vain >= self.job.give_up_after:
            raise UserError(
                f"{self.run_dir} was started {vain} times without passing step {step} (last end: "
                f"{why}), so it is not restarted. Give it more time (--time, or GraceTime for a "
                "preemption) or save.every_steps=N with a small N, and continue with "
                f"`{typed('slurm', 'resume', self.run_dir)}`"
            )
        again = history.restarts(history.history(self.run_dir))
        if why:
            job = self.context.job
            self._print(f"restart {len(again)}, job {job}, from step {step}, on {hosts}: {why}")
        tags = {"slurm_job": self.context.job, "restarts": str(len(again))}
        for number, event in list(enumerate(again, start=1))[-100:]:
            tags[f"restart_{number:03}"] = f"step {event.step}: {event.text}"
        return tags

    def _end(self, status: int) -> int:
        """End the start after training: the run is finished, restarts, or was stopped."""
        number = status - 128
        if number <= 0:
            self._note("finished" if status == 0 else "failed")
            return status
        if not self.is_first:
            # Rank 0 decides: srun ends all processes as soon as one fails, while rank 0 may still
            # have files to write.
            return 0
        why = self.context.why_stopped(number)
        self._note("stopped", why)
        if number not in RESTART_AFTER:
            return status
        if self.context.was_cancelled():
            # Slurm would requeue the job although it was cancelled.
            self._print("saved; the job was cancelled meanwhile")
            self._announce("KILLED")
            return status
        self._print(f"{why}: saved, the job restarts")
        return self.context.start_again()

    def _fail(self, status: int, why: str) -> int:
        """Record a failure on rank 0, while srun ends the other processes and soon this one."""
        if self.is_first:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._note("failed", why)
            self._announce("FAILED")
        return status

    def _record_failure(self, error: Exception) -> None:
        """Record the error where it was raised, while the other processes wait for this one."""
        # If rank 0 is gone, rank 1 writes the history.
        is_of_rank_0 = isinstance(error, PeerFailed) and str(error).startswith("rank 0 ")
        replaces_rank_0 = is_of_rank_0 and self.context.rank == 1
        self.is_first |= replaces_rank_0
        self._wait_for_lost_nodes()
        self._write_failure(error)
        if isinstance(error, PeerFailed):
            # The watchdog ends this process at once, so write now.
            self._show_first_failure(known=str(error))
            self._note("failed", str(error))
            if replaces_rank_0:
                self._announce("FAILED")

    def _wait_for_lost_nodes(self) -> None:
        """Requeue the job if one of its nodes does not answer, and wait until Slurm ends it.

        A crashed node first shows as a lost connection. Slurm takes minutes to notice the node. If
        the job exited before that, Slurm would count it as failed; if it still runs then, Slurm
        requeues it on other nodes.
        """
        silent = self.context.silent_hosts()
        if not silent:
            return
        text = f"a node failed: {', '.join(silent)} does not answer"
        self._note("stopped", text)
        self._print(f"{text}; waiting for Slurm to requeue the job")
        if threading.current_thread() is threading.main_thread():
            # Only the main thread may set it; otherwise Slurm's SIGKILL follows shortly.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # If the node is back before Slurm has noticed, srun misses its processes and ends the job.
        if self.is_first:
            self.context.start_again()
        end = time.monotonic() + NODE_PATIENCE
        while silent and time.monotonic() < end:
            time.sleep(5)
            silent = self.context.silent_hosts()

    def _note(self, kind: EventKind, text: str = "") -> None:
        """Add a line to the history, on the first process."""
        if self.is_first:
            step = history.saved_step(self.run_dir)
            event = JobEvent(kind, self.context.job, self.context.restart, step, text)
            with self._if_possible():
                history.note(self.run_dir, event)

    def _announce(self, status: str) -> None:
        """Update MLflow, on the first process."""
        if self.is_first and self.config is not None:
            announce(self.config, status, {})

    def _print(self, text: str) -> None:
        prefix = "" if self.context.rank == 0 else f"rank {self.context.rank}: "
        with contextlib.suppress(OSError):
            print(f"{prefix}{text}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _if_possible(self) -> Iterator[None]:
        """Print what cannot be recorded: a full disk may be the very failure."""
        try:
            yield
        except OSError as error:
            self._print(f"not recorded: {error}")

    def _write_failure(self, error: Exception) -> None:
        context = self.context
        known = isinstance(error, (*MISTAKES, PeerFailed))
        text = f"error: {error}" if known else "".join(traceback.format_exception(error))
        where = f"rank {context.rank} on {os.uname().nodename}:"
        with self._if_possible():
            history.write_failure(
                self.log, context.job, context.restart, context.rank, f"{where}\n{text}"
            )

    def _show_first_failure(self, known: str | None = None) -> None:
        """Print the first failure to rank 0's log, which users read first, unless it is ``known``
        there.
        """
        text = history.first_failure(self.log, self.context.job, self.context.restart)
        if not self.is_first or text is None or text.startswith("rank 0 "):
            return
        if known is None or known not in text:
            self._print(f"the first to fail was {text}\n")
