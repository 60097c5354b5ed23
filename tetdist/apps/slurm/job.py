"""The work of each process of a job: find the others, train, and see that the run goes on.

A job knows nothing but where its run folder is. So every start of it is the same, whether it is the
first, a requeue by the job itself, by an administrator, after a preemption or after a node's crash:
the newest whole checkpoint says where to go on.
"""

import itertools
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

# Set before torch is imported, which reads it then: see tetdist_command.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tetdist.apps.slurm import history
from tetdist.apps.slurm.history import EventKind, JobEvent
from tetdist.apps.slurm.placement import ProcessContext, SlurmContext
from tetdist.errors import PEER_FAILED, PeerFailed, UserError, sentence, typed

if TYPE_CHECKING:
    from tetdist.config.schema import RunConfig

# Slurm warns of a time limit or a preemption by USR2; a person may send USR1 to the same end. After
# either the job starts itself again. SIGTERM means that Slurm has decided what comes next: then the
# job saves and leaves that to Slurm.
RESTART_AFTER = (signal.SIGUSR1, signal.SIGUSR2)

# Seconds within which Slurm should have noticed a crashed node. Its own limit is SlurmdTimeout, by
# default 300.
NODE_PATIENCE = 1200.0


@dataclass(frozen=True)
class Job:
    """A run on a cluster, or on this machine; pickled by submitit, called in each process.

    Attributes:
        run_dir: The run's folder.
        config: The configuration's file.
        code: Folder from which the code is to be imported.
        log: Folder for what failed.
        give_up_after, warn_before_end, interface: See `ClusterSection`.
    """

    run_dir: str
    config: str
    code: str
    log: str
    give_up_after: int
    warn_before_end: int
    interface: str | None

    def __call__(self) -> None:
        """Run as a task of Slurm; ends the process."""
        # A signal must wait until the trainer is there to receive it, and must do nothing once the
        # trainer is done. submitit's own handlers are made for functions that cannot stop by
        # themselves: they would end the job too early, or keep it from ending.
        signal.pthread_sigmask(signal.SIG_BLOCK, RESTART_AFTER)
        for number in RESTART_AFTER:
            signal.signal(number, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGCONT):
            signal.signal(number, signal.SIG_DFL)
        sys.exit(run(self, lambda: SlurmContext.find(self.interface, self.warn_before_end)))


def run(job: Job, find_context: Callable[[], ProcessContext]) -> int:
    """Do one process's part of one start of the job; returns its exit status."""
    rank = os.environ.get("SLURM_PROCID", "?")
    try:
        context = find_context()
        context.export()
    except (UserError, ModuleNotFoundError) as error:
        print(f"rank {rank}: error: {sentence(error)}", file=sys.stderr)
        return 2
    return _Start(job, context).run()


class _Start:
    """One start of a job, in one process."""

    def __init__(self, job: Job, context: ProcessContext) -> None:
        self.job, self.context = job, context
        self.run_dir, self.log = Path(job.run_dir), Path(job.log)
        self.is_first = context.rank == 0
        self._prefix = "" if self.is_first else f"rank {context.rank}: "
        self.config: RunConfig | None = None

    def run(self) -> int:
        level = logging.INFO if self.is_first else logging.ERROR
        logging.basicConfig(level=level, format="%(message)s", force=True)
        try:
            self._check_code()
            if self._is_cancelled():
                # This is no success: another run may be waiting for this one to finish.
                return 128 + signal.SIGTERM
            from tetdist.apps.reports.observers import observers
            from tetdist.config import loading
            from tetdist.training.run import train
            from tetdist.training.run_record import Launcher

            self.config = loading.load_written(Path(self.job.config))
            tags = self._begin() if self.is_first else {}
            launcher = Launcher(
                tags=tags, restarts_after=RESTART_AFTER, on_failure=self._on_failure
            )
            status = train(self.config, observers, launcher)
        except (UserError, ModuleNotFoundError) as error:
            self._write_failure(error)
            print(f"{self._prefix}error: {sentence(error)}", file=sys.stderr)
            return self._end_failed(2, str(error))
        except PeerFailed as error:
            # It was written down where it was raised.
            print(f"{self._prefix}error: {error}", file=sys.stderr)
            if self.is_first and self.config is not None:
                # There was no tracker yet that would have told MLflow.
                history.announce(self.config, "FAILED", {})
            return PEER_FAILED
        except SystemExit as ended:
            return self._end_failed(int(ended.code or 0), "another process says why")
        except Exception as error:
            self._write_failure(error)
            self._show_first_failure()
            traceback.print_exc()
            return self._end_failed(1, f"{type(error).__name__}: {error}".splitlines()[0])
        return self._end(status)

    def _check_code(self) -> None:
        """See that the queued code is what runs, whatever the environment has installed.

        Raises:
            UserError: Python imports other code.
        """
        here = Path(__file__).resolve().parents[3]
        if here != Path(self.job.code).resolve():
            raise UserError(
                f"the job was submitted with the code in {self.job.code} and Python imports that "
                f"in {here}; does a command of cluster.setup change PYTHONPATH?"
            )

    def _is_cancelled(self) -> bool:
        """Return whether the run was cancelled and a requeue at that moment undid it."""
        events = history.since_submission(history.history(self.run_dir))
        return any(event.kind == "cancelled" for event in events)

    def _begin(self) -> dict[str, str]:
        """Note this start, and refuse it if the starts lead nowhere. Returns tags for MLflow."""
        context = self.context
        step = history.saved_step(self.run_dir)
        earlier = history.history(self.run_dir)
        starts = [e for e in history.since_submission(earlier) if e.kind == "started"]
        why = self._why_started(earlier)
        self._note("started", f"{why}; on {', '.join(context.hosts)}" if why else "")
        in_vain = itertools.takewhile(lambda start: start.step == step, reversed(starts))
        vain = len(list(in_vain))
        if vain >= self.job.give_up_after:
            raise UserError(
                f"{self.run_dir} was started {vain} times without getting past step {step}, the "
                f"last time until: {why}; it is not tried again. Give it more time before it is "
                "stopped (--time, or GraceTime for a preemption) or save.every_steps=N with a "
                f"small N, and continue with `{typed('slurm', 'resume', self.run_dir)}`"
            )
        again = history.restarts(history.history(self.run_dir))
        if why:
            print(
                f"restart {len(again)}, job {context.job}, from step {step}, on "
                f"{', '.join(context.hosts)}: {why}",
                file=sys.stderr,
                flush=True,
            )
        tags = {"slurm_job": context.job, "restarts": str(len(again))}
        for i, event in enumerate(again[-100:], start=max(0, len(again) - 100) + 1):
            tags[f"restart_{i:03}"] = f"step {event.step}: {event.text}"
        return tags

    def _why_started(self, earlier: list[JobEvent]) -> str:
        """The reason why this is not the run's first start; empty if it is."""
        if not any(event.kind == "started" for event in earlier):
            return ""
        last = earlier[-1]
        if last.kind == "submitted":
            return "submitted again"
        if last.kind == "finished":
            return "started once more after its end"
        # The process wrote down a guess when it was stopped; Slurm's account of it comes later.
        if last.kind == "started":
            return self.context.why_ended() or "ended without a word"
        if last.kind == "failed":
            # The process saw no more than the loss of another, say, of which Slurm knows the cause.
            return self.context.why_ended() or last.text
        if "from outside" in last.text:
            account = self.context.why_ended()
            name = last.text.partition(" ")[0]
            if account and (name == "SIGTERM" or account == "preempted"):
                return f"{account} ({name})"
        return last.text

    def _end(self, status: int) -> int:
        """Finish the start after training: the run is done, is started again, or was stopped."""
        number = status - 128
        if number <= 0:
            self._note("finished" if status == 0 else "failed")
            return status
        if not self.is_first:
            # Rank 0 decides: srun ends all processes when one reports a failure, and rank 0 may
            # still have something to write.
            return 0
        why = self.context.why_stopped(number)
        self._note("stopped", why)
        if number not in RESTART_AFTER:
            return status
        if self.context.was_cancelled():
            # Slurm would requeue the job although it was cancelled.
            print("the job was cancelled meanwhile; all is saved", file=sys.stderr, flush=True)
            assert self.config is not None
            history.announce(self.config, "KILLED", {})
            return status
        print(f"{why}: all is saved, the job is started again", file=sys.stderr, flush=True)
        return self.context.start_again()

    def _end_failed(self, status: int, why: str) -> int:
        """Write a failure down, on rank 0, while srun ends the others, and this process soon."""
        if self.is_first:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._note("failed", why)
            if self.config is not None:
                history.announce(self.config, "FAILED", {})
        return status

    def _note(self, kind: EventKind, text: str = "") -> None:
        """Write a line of the history, on the process that does so for all."""
        if self.is_first:
            step = history.saved_step(self.run_dir)
            event = JobEvent(kind, self.context.job, self.context.restart, step, text)
            history.note(self.run_dir, event)

    def _on_failure(self, error: Exception) -> None:
        """Write the error down where it was raised, while the other processes wait for this one.

        A crashed node is first seen as a lost connection. If the job ended with that, Slurm, which
        takes minutes to miss a node, would count it as failed; if it still runs when Slurm does, it
        is started again on other nodes.
        """
        # Where it is rank 0 that is gone, the next one writes the history.
        is_of_rank_0 = isinstance(error, PeerFailed) and str(error).startswith("rank 0 ")
        in_its_place = is_of_rank_0 and self.context.rank == 1
        self.is_first |= in_its_place
        silent = self.context.silent_hosts()
        if silent:
            text = f"a node failed: {', '.join(silent)} does not answer"
            self._note("stopped", text)
            print(f"{text}; waiting for Slurm to start the job again", file=sys.stderr, flush=True)
            if threading.current_thread() is threading.main_thread():
                # In the watch's thread it may not be set; Slurm's SIGKILL comes a moment later.
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            end = time.monotonic() + NODE_PATIENCE
            while silent and time.monotonic() < end:
                time.sleep(5)
                silent = self.context.silent_hosts()
        self._write_failure(error)
        if isinstance(error, PeerFailed):
            # The watch ends this process at once, so this is the last chance to write.
            self._show_first_failure(known=str(error))
            self._note("failed", str(error))
            if in_its_place and self.config is not None:
                history.announce(self.config, "FAILED", {})

    def _write_failure(self, error: Exception) -> None:
        context = self.context
        known = isinstance(error, UserError | ModuleNotFoundError | PeerFailed)
        text = f"error: {error}" if known else "".join(traceback.format_exception(error))
        where = f"rank {context.rank} on {os.uname().nodename}:"
        place = (context.job, context.restart, context.rank)
        history.write_failure(self.log, *place, f"{where}\n{text}")

    def _show_first_failure(self, known: str | None = None) -> None:
        """Print it to rank 0's log, which people read first, ahead of rank 0's own complaint.

        Args:
            known: What has been said there.
        """
        text = history.first_failure(self.log, self.context.job, self.context.restart)
        if not self.is_first or text is None or text.startswith("rank 0 "):
            return
        if known is None or known not in text:
            print(f"the first to fail was {text}\n", file=sys.stderr, flush=True)
