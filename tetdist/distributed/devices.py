"""The device on which this process computes, and how it keeps memory there."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from tetdist.errors import UserError
from tetdist.wording import and_more

# Seconds. nvidia-smi answers in one or two, unless a driver hangs.
_SMI_TIMEOUT = 20

# Folder in which Linux describes PCI devices.
PCI = Path("/sys/bus/pci/devices")

# Remedies for GPUs that the driver does not offer, by CUDA's number of the error.
NOT_READY = {
    "802": "NVSwitch is not set up: start the nvidia-fabricmanager of the driver's version",
    "803": "the driver and its libcuda.so have different versions: restart this machine",
    "804": "libcuda.so is newer than the driver: take cuda-compat out of LD_LIBRARY_PATH",
    "999": "the driver fails: see the rights of /dev/nvidia*, and sudo dmesg | grep -i nvrm",
}

# Parameters of glibc's mallopt, as malloc.h has them.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """Choose the device of a process, and make it torch's current one if it is a GPU.

    Args:
        wanted: ``auto`` (a GPU if there is one), ``cpu`` or ``cuda``.
        local_rank: Number of the process on its host, from 0.

    Raises:
        UserError: torch sees fewer GPUs than there are processes on the host, or none although
            ``wanted`` is ``cuda`` or the machine has one: training on the CPU by mistake would take
            a hundred times as long.
    """
    assert wanted in ("auto", "cpu", "cuda"), wanted
    # With this variable DeepSpeed stays on the CPU, whatever the other parts do.
    kept_off = os.environ.get("DS_ACCELERATOR") == "cpu"
    if wanted == "cuda" and kept_off:
        raise UserError("device=cuda, but DS_ACCELERATOR=cpu is set in the environment; unset one")
    if wanted == "cpu" or kept_off:
        return torch.device("cpu")
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if count > 1 and local_rank >= count:
            raise UserError(
                f"local rank {local_rank} has no GPU of its own: torch sees {count} on this host; "
                "start one process a GPU"
            )
        # Some launchers show each process its own GPU only, as number 0.
        device = torch.device("cuda", 0 if count == 1 else local_rank)
        torch.cuda.set_device(device)
        return device
    if wanted == "cuda":
        raise UserError(
            f"device=cuda, but torch sees no GPU here: {_why_no_gpu()}; set device=cpu to train on "
            "the CPU"
        )
    if present := _gpus_of_the_machine():
        raise UserError(
            f"there is {present}, but torch does not see it: {_why_no_gpu()}; set device=cpu to "
            "train on the CPU all the same"
        )
    return torch.device("cpu")


def cores_near(gpu: torch.device) -> set[int]:
    """Return the cores of the NUMA node that a GPU is connected to; empty if they are unknown."""
    card: Any = torch.cuda.get_device_properties(gpu)
    try:
        # Older versions of torch lack them.
        place = f"{card.pci_domain_id:04x}:{card.pci_bus_id:02x}:{card.pci_device_id:02x}.0"
        listed = (PCI / place / "local_cpulist").read_text()  # 0-23,48-71, or nothing
    except (AttributeError, OSError):
        return set()
    ends = [one.split("-") for one in listed.split(",") if one.strip()]
    return {core for end in ends for core in range(int(end[0]), int(end[-1]) + 1)}


def _gpus_of_the_machine() -> str | None:
    """Name the GPUs that this process should see; None if there are none or they are hidden."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):
        return None
    granted = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    if granted != "0":
        return f"a GPU that Slurm has granted to this job (SLURM_GPUS_ON_NODE={granted})"
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    try:
        listed = subprocess.run(
            [command, "-L"], capture_output=True, text=True, timeout=_SMI_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    if listed.returncode or not lines:
        return None
    return f"{lines[0].partition(' (UUID')[0]} (nvidia-smi){and_more(lines)}"


def _why_no_gpu() -> str:
    """Return why torch sees no GPU, and what to do."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):
        return "CUDA_VISIBLE_DEVICES hides all of them"
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built for the CPU; install one that is built for CUDA "
            "(pytorch.org has the command for each driver)"
        )
    try:
        torch.cuda.init()
        reason = "it finds no device"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
    if remedy := gpu_remedy(reason):
        return f"torch says: {reason} ({remedy})"
    return (
        f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, and says: {reason} "
        "(nvidia-smi shows the newest CUDA that the driver takes; pytorch.org has the command that "
        "installs torch for it)"
    )


def gpu_remedy(text: str) -> str | None:
    """Return the remedy for the error that a text quotes, if it is one of `NOT_READY`."""
    quoted = re.search(r"\berror (\d+)\b", text, re.IGNORECASE)
    return NOT_READY.get(quoted[1]) if quoted else None


def keep_freed_memory() -> None:
    """Have malloc keep the memory of freed tensors for the next ones.

    By default glibc returns the memory of large tensors to the system at once, and the system
    clears its pages before it hands them out again: on a CPU in every step, for almost every
    tensor. Nothing changes where the environment configures malloc (MALLOC_..., GLIBC_TUNABLES), or
    without glibc.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
