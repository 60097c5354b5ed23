"""Cluster job on this machine, without Slurm: ``slurm --local N``.

python -m tetdist.apps.slurm.local JOB.json      (one process of the job)
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType

# Imported before torch, because it sets a variable that torch reads.
from tetdist.apps.slurm.job import RESTART_AFTER, Job, run
from tetdist.apps.slurm.placement import AGAIN, LocalContext
from tetdist.distributed.meeting import free_port
from tetdist.distributed.signals import handling
from tetdist.distributed.starters import as_starter, end_with_starters

FORWARDED = (signal.SIGTERM, *RESTART_AFTER)
# Seconds within which the other processes must end after one has failed.
PATIENCE = 10.0


def run_here(job: Job, processes: int) -> int:
    """Run a job in ``processes`` processes, restart it on request, and return its exit status."""
    file = Path(job.config).with_name("job.json")
    file.write_text(json.dumps(asdict(job)))
    restart = 0
    while (status := _start(file, job, processes, restart)) == AGAIN:
        restart += 1
    return status


def _start(file: Path, job: Job, processes: int, restart: int) -> int:
    common = {
        **os.environ,
        **as_starter(),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "TETDIST_RESTART": str(restart),
        "TETDIST_COMMAND": "job",
        "PYTHONPATH": os.pathsep.join([job.code, os.environ.get("PYTHONPATH", "")]).rstrip(":"),
    }
    command = [sys.executable, "-m", "tetdist.apps.slurm.local", str(file)]
    running: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for process in running:
            process.send_signal(number)

    # Blocked signals stay pending, so a child that is still importing handles them later.
    signal.pthread_sigmask(signal.SIG_BLOCK, RESTART_AFTER)
    # A terminal sends Ctrl-C to the child processes directly.
    with handling(FORWARDED, forward), handling([signal.SIGINT], lambda *_: None):
        try:
            for rank in range(processes):
                env = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                running.append(subprocess.Popen(command, env=env, cwd=job.code))
                if received:  # The signal came before this child existed.
                    running[-1].send_signal(received[-1])
            signal.pthread_sigmask(signal.SIG_UNBLOCK, RESTART_AFTER)
            return _wait(running)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, RESTART_AFTER)
            for process in running:
                if process.poll() is None:
                    process.kill()
                process.wait()


def _wait(running: list[subprocess.Popen[bytes]]) -> int:
    """Wait until all have ended, or one has failed and the others had time to report it."""
    failed_at: float | None = None
    first = 0
    # Poll all: the status of a process is unknown until it is polled.
    while None in [process.poll() for process in running]:
        failed = [p.returncode for p in running if p.returncode not in (None, 0, AGAIN)]
        if failed and failed_at is None:
            first, failed_at = failed[0], time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > PATIENCE:
            break
        time.sleep(0.05)
    statuses = [process.returncode for process in running if process.returncode]
    status = first or next((s for s in statuses if s != AGAIN), 0) or (AGAIN if statuses else 0)
    return status if status >= 0 else 128 - status


def main() -> int:
    end_with_starters()
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    return run(job, LocalContext.find)


if __name__ == "__main__":
    sys.exit(main())
