"""Batch script of a job, and its submission by submitit."""

import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from tetdist.apps.slurm.cluster import ClusterSection
from tetdist.apps.slurm.job import Job
from tetdist.distributed.rendezvous import TOKEN
from tetdist.errors import UserError

# Remedy for a refusal by sbatch, by a word in the refusal.
WAYS_OUT = {
    "partition": "give --partition P; `sinfo` lists the partitions",
    "account": "give --account A; `sacctmgr show associations user=$USER` lists yours",
    "qos": "give --qos Q; `sacctmgr show associations user=$USER` lists yours",
    "feature": "give --constraint C; `sinfo -o '%N %f'` lists the nodes' features",
    "generic resource": "change --gpus-per-node G; `sinfo -o '%N %G'` lists the nodes' GPUs",
    "node configuration": "ask for less; `sinfo -o '%D %c %m %G'` lists the nodes with their CPUs, "
    "MB and GPUs",
    "fetch_config": "this machine knows no cluster; run this on a login node, or use --dry-run",
    "unable to contact": "the controller is down, or this is not a login node; try `sinfo`",
    "unrecognized option": "correct cluster.sbatch; `sbatch --help` lists its flags",
    "time limit": "give a shorter --time; `sinfo -o '%P %l'` lists the partitions' limits",
}

# The setup or the environment may already have chosen one.
_INTERFACE = "export GLOO_SOCKET_IFNAME=${{GLOO_SOCKET_IFNAME:-{}}}"


def parameters(
    name: str, cluster: ClusterSection, code: Path, after: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the parameters of submitit's SlurmExecutor, in sbatch's terms, for a job in the folder
    ``code`` that the jobs ``after`` must precede.
    """
    values: dict[str, Any] = {
        "job_name": name,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.processes_per_node,
        # All processes of a node see all its GPUs and choose theirs by local rank: with
        # gpus_per_task, NCCL cannot copy from GPU to GPU on some clusters.
        "gpus_per_node": cluster.gpus_per_node or None,
        "cpus_per_task": cluster.cpus_per_task,
        "mem": f"{round(cluster.mem_gb * 1024)}MB" if cluster.mem_gb else None,
        "time": cluster.minutes,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "signal_delay_s": cluster.warn_before_end,
        # A rank's output and errors go to one file.
        "stderr_to_stdout": True,
        "srun_args": [
            # One failed process ends the job at once; otherwise the others would wait for it.
            "--kill-on-bad-exit=1",
            # Since Slurm 22.05 srun does not inherit this flag from sbatch; without it each
            # process would have a single core.
            *([f"--cpus-per-task={cluster.cpus_per_task}"] if cluster.cpus_per_task else []),
            # Slurm would bind tasks to cores in order. Processes bind themselves, each to cores
            # near its own GPU.
            *(["--cpu-bind=none"] if cluster.gpus_per_node else []),
        ],
        "setup": [
            # Generated at every start; only this user's processes know it.
            f"export {TOKEN}=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \\n')",
            *cluster.setup,
            *([_INTERFACE.format(shlex.quote(cluster.interface))] if cluster.interface else []),
            # The snapshot takes precedence over installed code; `python -m` looks here first.
            f"cd {shlex.quote(str(code))}",
            f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
            "# srun starts one process a task. The Python after -c blocks Slurm's warning signals",
            "# until the trainer handles them; then it becomes the trainer.",
        ],
        "additional_parameters": {"requeue": True} | _depending_on(after, cluster.sbatch),
        "wckey": None,
    }
    return {key: value for key, value in values.items() if value is not None or key == "wckey"}


def _depending_on(after: Sequence[str], flags: dict[str, Any]) -> dict[str, Any]:
    """Return sbatch's flags with this dependency, added to one that they may have already."""
    if not after:
        return flags
    # For Slurm a requeued job has not ended: it keeps its id, and its dependents keep waiting.
    dependency = f"afterok:{':'.join(after)}"
    if "dependency" in flags:
        dependency += f",{flags['dependency']}"
    # Otherwise a job whose predecessor failed would stay in the queue for ever.
    return {"kill-on-invalid-dep": "yes"} | flags | {"dependency": dependency}


def python_command() -> str:
    """Return a command that starts Python so that an early Slurm warning is neither fatal nor lost.

    Without a handler, USR2 would kill a process that is still importing, and with it the job. A
    blocked signal stays pending, even across exec; so a minimal Python blocks the signals and then
    executes the Python that trains.
    """
    block = (
        "import os,signal as s,sys;s.pthread_sigmask(s.SIG_BLOCK,(s.SIGUSR1,s.SIGUSR2));"
        'os.environ["TETDIST_COMMAND"]="job";'
        "os.execv(sys.executable,[sys.executable,*sys.argv[1:]])"
    )
    return f"{shlex.quote(sys.executable)} -I -S -c {shlex.quote(block)}"


def text(values: dict[str, Any], folder: Path) -> str:
    """Return the batch script that submitit writes: for ``--dry-run``, which needs no Slurm."""
    # submitit has no public function for it that works without srun.
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{python_command()} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return str(_make_sbatch_string(command=command, folder=folder, **values))


def submit(job: Job, values: dict[str, Any], folder: Path) -> str:
    """Submit a job, and return its id."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = submitit.SlurmExecutor(folder=folder, python=python_command())
    executor.update_parameters(**values)
    try:
        # submitit prints sbatch's message, which its exception also holds; avoid printing it twice.
        with redirect_stderr(StringIO()):
            return str(executor.submit(job).job_id)
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"Slurm refused the job: {_reason(str(error))}") from error


def _reason(text: str) -> str:
    """Return the remedy for a refusal, and sbatch's message within submitit's error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line.removeprefix("sbatch: ") for line in lines if line.startswith("sbatch: ")]
    errors = [line.removeprefix("error: ") for line in said]
    reason = "; ".join(errors or lines[-1:])
    ways = [way for word, way in WAYS_OUT.items() if word in reason.lower()]
    return f"{ways[0]} (sbatch: {reason})" if ways else reason
