"""Remedies for a machine, by cause."""

import os
import re
import subprocess

import torch

from tetdist.errors import UserError, pip_install, sentence

SMI_TIMEOUT = 20  # seconds; a working driver needs one or two


# Builds of torch at download.pytorch.org, newest first: name, oldest driver for this major version
# of CUDA, oldest and newest GPU by compute capability, packages, and tetdist's extra for DALI.
# Drivers are from NVIDIA's "Minor Version Compatibility"; GPUs from pytorch/pytorch's lists for the
# releases 2.10 to 2.14 (issues 172352, 190385), after which no build is for CUDA 12.
BUILDS = (
    ("cu130", 580, (7, 5), (12, 9), "torch torchvision", "cuda130"),
    ("cu126", 525, (5, 0), (9, 9), "'torch<2.15' torchvision", "cuda120"),
)

BUSY = "stop other programs on that GPU (nvidia-smi lists them), or use a GPU with more memory"
_READ_LOG = "read the driver's log with sudo dmesg | grep -i -e xid -e nvrm"
HARDWARE = (
    f"{_READ_LOG}; if the error repeats after a restart of the machine, have the GPU replaced"
)
HANGING_DRIVER = f"{_READ_LOG}, then restart the machine"
DEAD = (
    "read the launcher's message about that process first; if sudo dmesg | grep -i oom lists it, "
    "the host's memory was too small"
)
NETWORK = (
    "run the same command with NCCL_DEBUG=INFO before it to see how the GPUs are reached; "
    "nvidia-smi topo -m shows how they are connected, and NCCL_SOCKET_IFNAME=NAME chooses the "
    "network between hosts"
)

# Remedies by patterns of an exception's text, if its type is not specific.
_BY_TEXT = (
    (r"NCCL|ncclUnhandled|ncclSystem|ncclInternal", NETWORK),
    (r"uncorrectable ECC|illegal memory access|unspecified launch failure|hardware", HARDWARE),
    (r"shared memory|/dev/shm|bus error", "enlarge /dev/shm: docker run --ipc=host, or --shm-size"),
    (r"No space left", "make room in TMPDIR (or /tmp), or set TMPDIR=FOLDER on another disk"),
    (r"Too many open files", "run ulimit -n 65536 in the shell before the same command"),
)


def of(error: BaseException) -> str | None:
    """Return the remedy for an exception; None: unknown, perhaps a bug in tetdist."""
    text = str(error)
    match error:
        case torch.OutOfMemoryError():
            return BUSY
        case UserError() | ModuleNotFoundError():
            return sentence(error)
        case subprocess.TimeoutExpired() if "nvidia-smi" in str(error.cmd):
            return HANGING_DRIVER
        case _ if re.search(r"no kernel image|driver version is insufficient|too old", text):
            return torch_for(*driver_and_gpu())
    for pattern, remedy in _BY_TEXT:
        if re.search(pattern, text, re.IGNORECASE):
            return remedy
    return None


def hangs(name: str, processes: int) -> str:
    """Return the advice on a check that stands still."""
    driver = "check the GPUs with nvidia-smi, and the driver with sudo dmesg | grep -i xid"
    if processes == 1:
        return driver
    return f"run --only {name} with NCCL_DEBUG=INFO for details; {driver}"


def slow(name: str) -> str:
    """Return the advice on a check that makes progress, but has no time left."""
    alone = f"run the same command with --only {name}, which then has more time"
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= 1.5 * cores:
        return alone
    busy = f"this host is busy (load average {load:.0f} on {cores} cores)"
    return f"{busy}: end other programs (top lists them), or {alone}"


def torch_for(driver: int | None, gpu: tuple[int, int] | None) -> str:
    """Return the commands that install a torch and a matching DALI for a driver and a GPU.

    Args:
        driver: Major version of the driver; None: unknown, assumed to be new enough.
        gpu: Compute capability; None: unknown.
    """
    wanted = None
    for name, oldest_driver, oldest, newest, packages, dali in BUILDS:
        if gpu is not None and not oldest <= gpu <= newest:
            continue
        if driver is None or driver >= oldest_driver:
            return (
                "pip uninstall -y torch torchvision nvidia-dali-cuda120 nvidia-dali-cuda130; "
                f"pip install {packages} --index-url https://download.pytorch.org/whl/{name}; "
                f"{pip_install(f'train,{dali}')}"
            )
        wanted = oldest_driver
    if wanted is None:
        return f"no torch is built for a GPU of capability {gpu}; use another GPU"
    return (
        f"install a driver of version {wanted} or newer, as root (Ubuntu: apt-get install "
        f"nvidia-driver-{wanted}-server), and restart the machine; this one is {driver}"
    )


def driver_and_gpu() -> tuple[int | None, tuple[int, int] | None]:
    """Return the driver's major version and the first GPU's capability; None: unknown."""
    try:
        line = smi("driver_version,compute_cap").splitlines()[0]
        driver, capability = line.split(", ")
        major, minor = capability.split(".")
        return int(driver.partition(".")[0]), (int(major), int(minor))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None, None


def smi(query: str, *options: str) -> str:
    """Return nvidia-smi's answer, one line for each GPU.

    Raises:
        FileNotFoundError: There is no nvidia-smi.
        subprocess.TimeoutExpired: It does not answer.
        subprocess.CalledProcessError: It fails.
    """
    return nvidia_smi(f"--query-gpu={query}", "--format=csv,noheader", *options)


def nvidia_smi(*options: str) -> str:
    """Return nvidia-smi's output; raise as `smi`."""
    words = ["nvidia-smi", *options]
    done = subprocess.run(words, capture_output=True, text=True, timeout=SMI_TIMEOUT, check=True)
    return done.stdout
