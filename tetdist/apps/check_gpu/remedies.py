"""Remedies for a machine, by cause."""

import contextlib
import re
import subprocess

import torch

from tetdist.distributed.devices import gpu_remedy
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
THROTTLED = "see what throttles that rank's GPU: nvidia-smi -q -d PERFORMANCE,TEMPERATURE,CLOCK"
UNLIKE = "give all hosts the same driver and the same Python environment"
DRIVER = "read the driver's log (sudo dmesg | grep -i -e xid -e nvrm), and restart the machine"
HARDWARE = f"{DRIVER}; if the error repeats, have the GPU replaced"
DEAD = "read the launcher's message about it; sudo dmesg | grep -i oom shows a lack of memory"
NETWORK = "see how GPUs are connected: NCCL_DEBUG=INFO before the command, and nvidia-smi topo -m"
ENDED = f"read the stack on standard error, if any; if the GPU hangs, {DRIVER}"
# Remedies by patterns of an exception's type and text.
_BY_TEXT = (
    (r"OutOfMemoryError", BUSY),
    (r"TimeoutExpired.*nvidia-smi", DRIVER),
    (r"NCCL|ncclUnhandled|ncclSystem|ncclInternal", NETWORK),
    (r"uncorrectable ECC|illegal memory access|unspecified launch failure|hardware", HARDWARE),
    (r"shared memory|/dev/shm|bus error", "enlarge /dev/shm: docker run --ipc=host, or --shm-size"),
    (r"No space left", "make room in TMPDIR (or /tmp), or set TMPDIR=FOLDER on another disk"),
    (r"Too many open files", "run ulimit -n 65536 in the shell before the same command"),
    (r"PeerFailed", "start all processes, and read the launcher's output of those that ended"),
)


def of(error: Exception) -> str | None:
    """Return the remedy for an exception; None: unknown, perhaps a bug in tetdist."""
    text = f"{type(error).__name__}: {error}"
    if remedy := gpu_remedy(text):
        return remedy
    unseen = r"no kernel image|driver version is insufficient|too old|sees no GPU|does not see it"
    if re.search(unseen, text) and (seen := driver_and_gpu()) != (None, None):
        is_old = re.search(r"driver version is insufficient|driver .* is too old", text)
        cause = f"driver {seen[0]} is too old for CUDA {torch.version.cuda}; " if is_old else ""
        return cause + torch_for(*seen)
    if isinstance(error, UserError | ModuleNotFoundError):
        return sentence(error)
    remedies = (remedy for pattern, remedy in _BY_TEXT if re.search(pattern, text, re.IGNORECASE))
    return next(remedies, None)


def torch_for(driver: int | None, gpu: tuple[int, int] | None) -> str:
    """Return the commands that install a torch and a matching DALI for a driver (None: new enough)
    and a GPU's capability (None: any)."""
    fitting = [build for build in BUILDS if gpu is None or build[2] <= gpu <= build[3]]
    if not fitting:
        return f"no torch is built for a GPU of capability {gpu}; use another GPU"
    for name, oldest, _, _, packages, dali in fitting:
        if driver is None or driver >= oldest:
            remove = "pip uninstall -y torch torchvision nvidia-dali-cuda120 nvidia-dali-cuda130"
            index = f"https://download.pytorch.org/whl/{name}"
            install = f"pip install {packages} --index-url {index}"
            return f"{remove}; {install}; {pip_install(f'train,{dali}')}"
    return f"install a driver of version {oldest} or newer, and restart; this one is {driver}"


def driver_and_gpu() -> tuple[int | None, tuple[int, int] | None]:
    """Return the driver's major version and the first GPU's capability; None: unknown."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if versions := re.match(r"(\d+)[\d.]*, (\d+)\.(\d+)", smi("driver_version,compute_cap")):
            driver, major, minor = map(int, versions.groups())
            return driver, (major, minor)
    return None, None


def smi(query: str) -> str:
    """Return nvidia-smi's answer, one line for each GPU; raise OSError or SubprocessError."""
    words = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=SMI_TIMEOUT, check=True)
    return done.stdout
