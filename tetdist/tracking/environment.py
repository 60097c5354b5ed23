"""The environment of a process: versions, machine, commit."""

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tetdist.errors import without_passwords

PACKAGES = (
    "tetdist",
    "torch",
    "torchvision",
    "timm",
    "deepspeed",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "mlflow",
    "numpy",
)

SLURM_VARIABLES = (
    "SLURM_CLUSTER_NAME",
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_JOB_PARTITION",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_NUM_NODES",
    "SLURM_NTASKS",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_RESTART_COUNT",
)

_ROOT = Path(__file__).resolve().parents[2]


def versions() -> dict[str, str]:
    """Return versions of the packages that a result may depend on, without importing them."""
    installed: dict[str, str] = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


def environment() -> dict[str, Any]:
    """Return the environment of this process as JSON values, without importing packages.

    Unknown values are None, empty or left out.
    """
    gpus = _output(
        ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    )
    return {
        "python": platform.python_version(),
        "packages": versions(),
        "platform": platform.platform(),
        "hostname": socket.gethostname(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "gpus": gpus.splitlines(),
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "command": shlex.join(map(without_passwords, sys.argv)),
        "git": git_state() or None,
        "slurm": {name: os.environ[name] for name in SLURM_VARIABLES if name in os.environ},
    }


def cpu_model() -> str | None:
    """Return the processor's name; None if unknown."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or None


def git_state(root: Path = _ROOT) -> dict[str, Any]:
    """Return the state of a git checkout, by default tetdist's own; empty if it is none."""
    git = ["git", "-C", str(root)]
    top = _output([*git, "rev-parse", "--show-toplevel"])
    # tetdist may be installed in an environment within another project's checkout.
    if Path(top.strip()) != root:
        return {}
    status = _output([*git, "status", "--porcelain"])
    return {
        "commit": _output([*git, "rev-parse", "HEAD"]).strip(),
        # A result that is written into the checkout changes no code.
        "dirty": any(not line.startswith("??") for line in status.splitlines()),
        "status": status,
        "diff": without_passwords(_output([*git, "diff", "HEAD"])),
    }


def git_version(git: dict[str, Any] | None) -> str:
    """Return a checkout's short commit, marked if changed, from its `git_state`; empty: none."""
    return f"{git['commit'][:12]}{' (changed)' if git['dirty'] else ''}" if git else ""


def _output(command: list[str]) -> str:
    """Return the output of a command; empty if it fails or does not exist."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            check=True,
            timeout=20,
            # Otherwise `git status` would lock the index against the user's own commands.
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace")
