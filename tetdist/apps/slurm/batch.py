"""A job for submitit: the text of the batch script, and its submission."""

import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from tetdist.apps.slurm.cluster import ClusterSection
from tetdist.apps.slurm.job import Job
from tetdist.distributed.meeting import TOKEN
from tetdist.errors import UserError

# The way out of a refusal by sbatch, by a word in it.
WAYS_OUT = {
    "partition": "`sinfo` lists the partitions, of which --partition P names one",
    "account": "--account A names one of yours: `sacctmgr show associations user=$USER`",
    "qos": "--qos Q names one of yours: `sacctmgr show associations user=$USER`",
    "feature": "--constraint C names features that `sinfo -o '%N %f'` lists",
    "generic resource": "`sinfo -o '%N %G'` says which GPUs the nodes have for --gpus-per-node G",
    "node configuration": "`sinfo -o '%D %c %m %G'` says how many nodes there are, with how many "
    "CPUs, MB and GPUs",
    "time limit": "`sinfo -o '%P %l'` says which --time the partitions allow",
}


def parameters(
    name: str, cluster: ClusterSection, code: Path, after: Sequence[str] = ()
) -> dict[str, Any]:
    """Parameters of submitit's SlurmExecutor, in the words of sbatch.

    Args:
        name: The job's name.
        cluster: The facts.
        code: The folder that the job runs in.
        after: Jobs that have to end well first.
    """
    values: dict[str, Any] = {
        "job_name": name,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.processes_per_node,
        # All processes of a node see all its GPUs and take theirs by local rank: with
        # gpus_per_task NCCL could not copy from GPU to GPU on some clusters.
        "gpus_per_node": cluster.gpus_per_node or None,
        "cpus_per_task": cluster.cpus_per_task,
        "mem": f"{round(cluster.mem_gb * 1024)}MB" if cluster.mem_gb else None,
        "time": cluster.minutes,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "signal_delay_s": cluster.warn_before_end,
        # All that a rank prints goes to one file.
        "stderr_to_stdout": True,
        "srun_args": [
            # One dead process ends the job at once instead of leaving the others to wait for it.
            "--kill-on-bad-exit=1",
            # Since Slurm 22.05 srun no longer takes this flag over from sbatch; without it each
            # process would have a single core.
            *([f"--cpus-per-task={cluster.cpus_per_task}"] if cluster.cpus_per_task else []),
        ],
        "setup": [
            # Made anew at every start, and known to the processes of this user alone.
            f"export {TOKEN}=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \\n')",
            *cluster.setup,
            # The snapshot comes before whatever is installed; `python -m` looks here first.
            f"cd {shlex.quote(str(code))}",
            f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
            "# srun starts one process a task. The Python behind -c holds back Slurm's warning",
            "# signals until the trainer can take them, and becomes the one that trains.",
        ],
        "additional_parameters": {"requeue": True} | _depending_on(after, cluster.sbatch),
        "wckey": None,
    }
    return {key: value for key, value in values.items() if value is not None or key == "wckey"}


def _depending_on(after: Sequence[str], flags: dict[str, Any]) -> dict[str, Any]:
    """The flags of sbatch with this dependency, beside one that they may have already."""
    if not after:
        return flags
    # A requeued job has not ended for Slurm: it keeps its id, and the others go on waiting for it.
    dependency = f"afterok:{':'.join(after)}"
    if "dependency" in flags:
        dependency += f",{flags['dependency']}"
    # A job whose predecessor has failed would otherwise wait in the queue for ever.
    return {"kill-on-invalid-dep": "yes"} | flags | {"dependency": dependency}


def python_command() -> str:
    """Start Python so that an early warning from Slurm neither kills it nor is lost.

    Until there is a handler for it, USR2 would end a process that is still importing, and so the
    job. A signal that is blocked waits, also when the process becomes another program; so a Python
    that has imported next to nothing blocks them and becomes the one that trains.
    """
    block = (
        "import os,signal as s,sys;s.pthread_sigmask(s.SIG_BLOCK,(s.SIGUSR1,s.SIGUSR2));"
        'os.environ["TETDIST_COMMAND"]="job";'
        "os.execv(sys.executable,[sys.executable,*sys.argv[1:]])"
    )
    return f"{shlex.quote(sys.executable)} -I -S -c {shlex.quote(block)}"


def text(values: dict[str, Any], folder: Path, count: int = 1) -> str:
    """The batch script, as submitit writes it: for ``--dry-run``, which needs no Slurm."""
    # submitit has no public way to it without srun.
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{python_command()} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    array = {"map_count": count} if count > 1 else {}
    return str(_make_sbatch_string(command=command, folder=folder, **values, **array))


def submit(jobs: list[Job], values: dict[str, Any], folder: Path) -> list[str]:
    """Submit one job, or several as an array; returns their ids.

    Raises:
        UserError: Slurm refuses the job.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = submitit.SlurmExecutor(folder=folder, python=python_command())
    executor.update_parameters(**values)
    try:
        # submitit prints what sbatch says; it is in its error, too, and would be there twice.
        with redirect_stderr(StringIO()), executor.batch():
            submitted = [executor.submit(job) for job in jobs]
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"Slurm refuses the job: {_reason(str(error))}") from error
    return [str(job.job_id) for job in submitted]


def _reason(text: str) -> str:
    """The words of sbatch within submitit's report, and the way out."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line.removeprefix("sbatch: error: ") for line in lines if "sbatch: error:" in line]
    reason = "; ".join(said or lines[-1:])
    ways_out = [way for word, way in WAYS_OUT.items() if word in reason.lower()]
    return "; ".join([reason, *ways_out[:1]])
