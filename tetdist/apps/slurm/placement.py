"""Place of a process within its job: its rank, the rendezvous, and how the job restarts."""

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tetdist.apps.slurm import jobs
from tetdist.errors import UserError, typed

if TYPE_CHECKING:
    from submitit.slurm.slurm import SlurmJobEnvironment

# Port of slurmd by default. Where another port is used, even a refusal shows that a host is up.
SLURMD_PORT = 6818

# Seconds for which a saved job retries to requeue itself while Slurm's controller is down (for an
# update, say), and for which a query may take.
CONTROLLER_PATIENCE, QUERY_TIMEOUT = 1800.0, 15.0

# Linux gives ports above these to outgoing connections, which might take ours.
PORTS = range(16000, 32000)

# Reasons by the state that Slurm's accounting records of an earlier start.
REASONS = {
    "NODE_FAIL": "a node failed (NODE_FAIL)",
    "PREEMPTED": "preempted",
    "REQUEUED": "requeued from outside",
    "TIMEOUT": "time limit",
}


@dataclass(frozen=True)
class Context:
    """Task of a Slurm job, described by srun's variables."""

    rank: int
    job: str  # id
    restart: int  # number of earlier starts of the job
    hosts: tuple[str, ...]  # of the job
    warn_before_end: int  # seconds before the time limit at which Slurm warns
    # How the other hosts answered when the job started; a healthy one behind a firewall may not.
    answers: Mapping[str, int]

    @classmethod
    def find(cls, warn_before_end: int) -> "Context":
        """Return the context of this process, and export its place (`export_place`)."""
        task = export_place()
        hosts = tuple(task.hostnames)
        return cls(
            rank=task.global_rank,
            job=task.job_id,
            restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            hosts=hosts,
            warn_before_end=warn_before_end,
            answers=_answers([host for i, host in enumerate(hosts) if i != task.node]),
        )

    def silent_hosts(self) -> list[str]:
        """Return the hosts of the job that answer less than when it started."""
        now = _answers(list(self.answers))
        return sorted(host for host, before in self.answers.items() if now[host] < before)

    def was_cancelled(self) -> bool:
        """Return whether the job was cancelled while it saved."""
        # While a job's processes are ending, Slurm only reports COMPLETING.
        shown = _show(self.job)
        return "JobState=COMPLETING" in shown and "Reason=TimeLimit" not in shown

    def why_stopped(self, number: int) -> str:
        """Return the likely reason of the signal that has just stopped the run."""
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
        """Return why the job's previous start ended, by Slurm's accounting; None if unknown."""
        # If accounting lags or does not exist, the reason stays unknown.
        lines = _query("sacct", "-D", "-X", "-n", "-P", "-j", self.job, "-o", "State").splitlines()
        ended = [line for line in lines if line and not line.startswith(("RUNNING", "PENDING"))]
        return REASONS.get(ended[-1]) if ended else None

    def start_again(self) -> int:
        """Restart the whole job by `scontrol requeue`, on rank 0 after all processes have saved.

        submitit's checkpoint() is not used: it gives up after a few time limits, and it replaces
        the pickled job, which a requeue by Slurm does not, so there would be two kinds of restart.
        Here all starts are the same, and the run folder determines where to resume.

        Returns:
            Exit status: 0, or 1 after a refusal.
        """
        refusal = ""
        for _ in range(2):  # The controller may have come back just after the first attempt.
            try:
                status, _, refusal = jobs.query(
                    "scontrol", "requeue", self.job, patience=CONTROLLER_PATIENCE
                )
            except UserError as error:
                refusal = str(error)
                break
            if status == 0:
                return 0
        print(
            f"`scontrol requeue {self.job}` failed: {' '.join(refusal.split())}. If Slurm requeues "
            "the job itself, as after a preemption, nothing is to be done; otherwise continue with "
            f"`{typed('slurm', 'resume')} RUN`",
            file=sys.stderr,
            flush=True,
        )
        # Slurm ignores the status of a job that it requeues; for any other job it means failure.
        return 1


def export_place() -> "SlurmJobEnvironment":
    """Set the variables of torch's and DeepSpeed's rendezvous; return srun's values."""
    from submitit.slurm.slurm import SlurmJobEnvironment

    task = SlurmJobEnvironment()
    number = int(os.environ["SLURM_JOB_ID"])
    os.environ |= {
        "RANK": str(task.global_rank),
        "WORLD_SIZE": str(task.num_tasks),
        "LOCAL_RANK": str(task.local_rank),
        "LOCAL_WORLD_SIZE": str(task.num_tasks // task.num_nodes),
        "MASTER_ADDR": task.hostnames[0],
        "MASTER_PORT": str(PORTS[number * 7 % len(PORTS)]),
    }
    return task


def _answer(host: str) -> int:
    """Return 2 if slurmd answers, 1 if the host refuses the connection, as without slurmd, or 0."""
    try:
        socket.create_connection((host, SLURMD_PORT), timeout=5).close()
    except ConnectionRefusedError:
        return 1
    except OSError:
        return 0
    return 2


def _answers(hosts: Sequence[str]) -> dict[str, int]:
    """Return how hosts answer; all are asked in parallel."""
    with ThreadPoolExecutor(32) as threads:
        return dict(zip(hosts, threads.map(_answer, hosts), strict=True))


def _show(job: str) -> str:
    return _query("scontrol", "show", "job", "--oneliner", job)


def _query(*command: str) -> str:
    """Return the output of a Slurm command; empty on failure or timeout: no run depends on it."""
    try:
        status, output, _ = jobs.query(*command, patience=QUERY_TIMEOUT)
    except UserError:
        return ""
    return output if status == 0 else ""
