"""Place of a process within its job: its rank, the rendezvous, and how the job restarts."""

import os
import re
import signal
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tetdist.apps.slurm import jobs
from tetdist.apps.slurm.history import LOCAL
from tetdist.errors import UserError, typed

if TYPE_CHECKING:
    from submitit.slurm.slurm import SlurmJobEnvironment

# Exit status with which a process asks the local launcher to restart the run.
AGAIN = 75

# Port of slurmd. Any answer, even a refusal, shows that a host is up.
ANY_PORT = 6818

# Seconds for which a saved job retries to requeue itself while Slurm's controller is down (for an
# update, say); and seconds between two attempts.
CONTROLLER_PATIENCE, CONTROLLER_PAUSE = 1800.0, 5.0

# Timeouts of a requeue and of a query, in seconds.
REQUEUE_TIMEOUT, QUERY_TIMEOUT = 120.0, 15.0

# Linux gives ports above these to outgoing connections, which might take ours.
PORTS = range(16000, 32000)


@dataclass(frozen=True)
class ProcessContext(ABC):
    """Process of a job."""

    rank: int
    job: str  # id
    restart: int  # number of earlier starts of the job
    hosts: tuple[str, ...]  # of the job

    def silent_hosts(self) -> list[str]:
        """Return the hosts of the job that no longer answer."""
        return []

    def was_cancelled(self) -> bool:
        """Return whether the job was cancelled while it saved."""
        return False

    @abstractmethod
    def why_stopped(self, number: int) -> str:
        """Return the likely reason of the signal that has just stopped the run."""

    @abstractmethod
    def why_ended(self) -> str | None:
        """Return why the job's previous start ended, by Slurm's accounting; None if unknown."""

    @abstractmethod
    def start_again(self) -> int:
        """Restart the whole job, on rank 0 after saving; return the exit status."""


@dataclass(frozen=True)
class SlurmContext(ProcessContext):
    """Task of a Slurm job, described by srun's variables."""

    warn_before_end: int  # seconds before the time limit at which Slurm warns
    # The other hosts that answered when the job started; a healthy one behind a firewall may not.
    answering: tuple[str, ...]

    @classmethod
    def find(cls, warn_before_end: int) -> "SlurmContext":
        """Return the context of this process, and export its place (`export_place`)."""
        task = export_place()
        hosts = tuple(task.hostnames)
        return cls(
            rank=task.global_rank,
            job=task.job_id,
            restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            hosts=hosts,
            warn_before_end=warn_before_end,
            answering=tuple(_answering([h for i, h in enumerate(hosts) if i != task.node])),
        )

    def silent_hosts(self) -> list[str]:
        return sorted(set(self.answering) - set(_answering(self.answering)))

    def was_cancelled(self) -> bool:
        # While a job's processes are ending, Slurm only reports COMPLETING.
        shown = _show(self.job)
        return "JobState=COMPLETING" in shown and "Reason=TimeLimit" not in shown

    def why_stopped(self, number: int) -> str:
        name = signal.Signals(number).name
        end = int(os.environ.get("SLURM_JOB_END_TIME", "0"))
        if number == signal.SIGTERM:
            return f"{name} from outside: cancelled, preempted or requeued"
        # Slurm checks limits once or twice a minute, and may warn that much earlier.
        if end and end - time.time() <= self.warn_before_end + 60:
            return f"time limit ({name})"
        if re.search(r"\bPreemptTime=(?!None)", _show(self.job)):
            return f"preempted ({name})"
        return f"{name} from outside"

    def why_ended(self) -> str | None:
        # If accounting lags or does not exist, the reason stays unknown.
        lines = _query("sacct", "-D", "-X", "-n", "-P", "-j", self.job, "-o", "State").splitlines()
        ended = [line for line in lines if line and not line.startswith(("RUNNING", "PENDING"))]
        state = ended[-1] if ended else ""
        meaning = {
            "NODE_FAIL": "a node failed (NODE_FAIL)",
            "PREEMPTED": "preempted",
            "REQUEUED": "requeued from outside",
            "TIMEOUT": "time limit",
        }
        return meaning.get(state)

    def start_again(self) -> int:
        """Call `scontrol requeue`, from one process, after all have saved.

        submitit's checkpoint() is not used: it gives up after a few time limits, and it replaces
        the pickled job, which a requeue by Slurm does not, so there would be two kinds of restart.
        Here all starts are the same, and the run folder determines where to resume.
        """
        end = time.monotonic() + CONTROLLER_PATIENCE
        is_reported, refusals = False, 0
        while refusals < 2 and time.monotonic() < end:
            done, refusal = _run("scontrol", "requeue", self.job, timeout=REQUEUE_TIMEOUT)
            if done:
                return 0
            # If the controller answers another query, it has refused this one, unless it came back
            # in between.
            if _show(self.job):
                refusals += 1
                continue
            refusals = 0
            if not is_reported:
                print(
                    f"Slurm's controller does not answer ({refusal}); the run is saved, and the "
                    f"requeue is retried for {CONTROLLER_PATIENCE / 60:.0f} minutes",
                    file=sys.stderr,
                    flush=True,
                )
                is_reported = True
            time.sleep(CONTROLLER_PAUSE)
        print(
            f"`scontrol requeue {self.job}` failed: {refusal}. If Slurm requeues the job "
            "itself, as after a preemption, nothing is to be done; otherwise continue with "
            f"`{typed('slurm', 'resume')} RUN`",
            file=sys.stderr,
            flush=True,
        )
        # Slurm ignores the status of a job that it requeues; for any other job it means failure.
        return 1


class LocalContext(ProcessContext):
    """Process that `tetdist.apps.slurm.local` started on this machine."""

    @classmethod
    def find(cls) -> "LocalContext":
        env = os.environ
        return cls(
            rank=int(env["RANK"]),
            job=LOCAL,
            restart=int(env["TETDIST_RESTART"]),
            hosts=(socket.gethostname(),),
        )

    def why_stopped(self, number: int) -> str:
        return signal.Signals(number).name

    def why_ended(self) -> str | None:
        return None

    def start_again(self) -> int:
        return AGAIN


def export_place() -> "SlurmJobEnvironment":
    """Set the variables by which torch's and DeepSpeed's processes meet; return srun's values."""
    from submitit.slurm.slurm import SlurmJobEnvironment

    task = SlurmJobEnvironment()
    number = int(os.environ["SLURM_JOB_ID"])  # in an array, each task has its own
    os.environ |= {
        "RANK": str(task.global_rank),
        "WORLD_SIZE": str(task.num_tasks),
        "LOCAL_RANK": str(task.local_rank),
        "LOCAL_WORLD_SIZE": str(task.num_tasks // task.num_nodes),
        "MASTER_ADDR": task.hostnames[0],
        "MASTER_PORT": str(PORTS[number * 7 % len(PORTS)]),
    }
    return task


def _answers(host: str) -> bool:
    try:
        socket.create_connection((host, ANY_PORT), timeout=5).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True


def _answering(hosts: Sequence[str]) -> list[str]:
    """Return the hosts that answer; all are asked in parallel."""
    with ThreadPoolExecutor(32) as threads:
        return [host for host, ok in zip(hosts, threads.map(_answers, hosts), strict=True) if ok]


def _show(job: str) -> str:
    return _query("scontrol", "show", "job", "--oneliner", job)


def _query(*command: str) -> str:
    """Return the output of a Slurm command; empty on failure or timeout: no run depends on it."""
    done, text = _run(*command, timeout=QUERY_TIMEOUT)
    return text if done else ""


def _run(*command: str, timeout: float) -> tuple[bool, str]:
    """Run a Slurm command; return whether it succeeded, and its output or its error."""
    try:
        status, output, errors = jobs.query(*command, patience=timeout)
    except UserError as error:
        return False, str(error)
    return status == 0, output if status == 0 else " ".join(errors.split()) or f"status {status}"
