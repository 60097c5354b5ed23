"""Commands that repair a machine, by what is wrong with it."""

import re
import shutil
import subprocess

import torch

from tetdist.errors import UserError, pip_install, sentence

SMI_TIMEOUT = 20  # seconds, of which a driver that works needs one or two


# Builds of torch at download.pytorch.org, the newest first: the oldest driver that serves all of
# this major version of CUDA, the oldest and the newest GPU by compute capability, the packages, and
# tetdist's extra for DALI. NVIDIA: "Minor Version Compatibility"; the GPUs are those that
# pytorch/pytorch lists for its releases 2.10 to 2.14 (issues 172352, 190385), after which none is
# for CUDA 12.
BUILDS = (
    ("cu130", 580, (7, 5), (12, 9), "torch torchvision", "cuda130"),
    ("cu126", 525, (5, 0), (9, 9), "'torch<2.15' torchvision", "cuda120"),
)

BUSY = "end what else runs on that GPU (nvidia-smi lists it), or take one with more memory"
HARDWARE = (
    "sudo dmesg | grep -i -e xid -e nvrm says what the driver has seen; if it comes again after a "
    "restart of the machine, have the GPU replaced"
)
HANGING_DRIVER = (
    "sudo dmesg | grep -i -e xid -e nvrm says what the driver waits for; restart the machine"
)
DEAD = "what the launcher says of that process comes first; sudo dmesg | grep -i oom: memory"
NETWORK = (
    "the same command with NCCL_DEBUG=INFO before it says how the GPUs are reached; nvidia-smi "
    "topo -m shows how they are connected, and NCCL_SOCKET_IFNAME=NAME chooses the network "
    "between hosts"
)

# What exceptions say, where their types do not.
_SAID = (
    (r"NCCL|ncclUnhandled|ncclSystem|ncclInternal", NETWORK),
    (r"uncorrectable ECC|illegal memory access|unspecified launch failure|hardware", HARDWARE),
    (
        r"shared memory|/dev/shm|bus error",
        "give /dev/shm room: docker run --ipc=host, or --shm-size",
    ),
    (
        r"No space left",
        "make room where TMPDIR points (else /tmp), or TMPDIR=FOLDER of another disk",
    ),
    (r"Too many open files", "ulimit -n 65536, in the shell that starts it"),
)


def of(error: BaseException) -> str | None:
    """Return the remedy for the cause of an exception; None: unknown, and perhaps a fault of
    tetdist."""
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
    for pattern, remedy in _SAID:
        if re.search(pattern, text, re.IGNORECASE):
            return remedy
    return None


def hangs(name: str) -> str:
    """Return the advice on a check that hangs."""
    alone = f"--only {name} with NCCL_DEBUG=INFO shows more"
    return f"{alone}; nvidia-smi says whether the GPUs answer, sudo dmesg | grep -i xid why not"


def torch_for(driver: int | None, gpu: tuple[int, int] | None) -> str:
    """The commands that install a torch, and the DALI that suits it, for a driver and a GPU.

    Args:
        driver: Its major version; None: unknown, taken to be new enough.
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
        return f"no torch is built for a GPU of capability {gpu}: take another GPU"
    return (
        f"install a driver of version {wanted} or newer, as root (Ubuntu: apt-get install "
        f"nvidia-driver-{wanted}-server), and restart the machine; this one is {driver}"
    )


def driver_and_gpu() -> tuple[int | None, tuple[int, int] | None]:
    """Major version of the driver and capability of the first GPU, by nvidia-smi; None: unknown."""
    try:
        line = smi("driver_version,compute_cap").splitlines()[0]
        driver, capability = line.split(", ")
        major, minor = capability.split(".")
        return int(driver.partition(".")[0]), (int(major), int(minor))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None, None


def smi(query: str) -> str:
    """Return nvidia-smi's answer for each GPU, a line each.

    Raises:
        FileNotFoundError: There is none.
        subprocess.TimeoutExpired: It does not answer.
        subprocess.CalledProcessError: It fails.
    """
    command = shutil.which("nvidia-smi")
    if command is None:
        raise FileNotFoundError("nvidia-smi is not installed")
    asked = [command, f"--query-gpu={query}", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=SMI_TIMEOUT, check=True)
    return done.stdout
