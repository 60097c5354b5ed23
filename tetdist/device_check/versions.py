"""Whether driver, torch, DALI, DeepSpeed and the rest suit each other."""

import importlib.metadata
import importlib.util
import shutil
import subprocess
from typing import Any

import torch

from tetdist.device_check.check import Finding, Machine
from tetdist.tracking.environment import versions


def check_versions(here: Machine) -> Finding:
    """The packages, the driver, and the first misfit among them with the command that mends it."""
    found: dict[str, Any] = {"packages": versions(), "torch_cuda": torch.version.cuda}
    if here.on_gpu:
        properties = torch.cuda.get_device_properties(here.device)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": _driver(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "cudnn": torch.backends.cudnn.version(),
        }
    for misfit in (_foreign_architecture, _no_triton, _dali_of_another_cuda, _no_deepspeed):
        problem = misfit(here)
        if problem is not None:
            text, remedy = problem
            return Finding("bad", text, remedy, found)
    text = f"torch {torch.__version__}"
    if here.on_gpu:
        text = f"{found['gpu']}, driver {found['driver']}, {text}, NCCL {found['nccl']}"
    return Finding("ok", text, None, found)


Problem = tuple[str, str]  # what is wrong, and what mends it


def _foreign_architecture(here: Machine) -> Problem | None:
    if not here.on_gpu:
        return None
    major, minor = torch.cuda.get_device_capability(here.device)
    built = [name.removeprefix("sm_") for name in torch.cuda.get_arch_list() if "sm_" in name]
    # A GPU runs what is built for a smaller minor version of its own, and no other major one.
    if any(int(one[:-1]) == major and int(one[-1:]) <= minor for one in built if one.isdigit()):
        return None
    return (
        f"torch {torch.__version__} is built for sm_{', sm_'.join(built)}, and this GPU is "
        f"sm_{major}{minor}",
        "install another torch; pytorch.org has the command",
    )


def _no_triton(here: Machine) -> Problem | None:
    if not here.on_gpu or importlib.util.find_spec("triton") is not None:
        return None
    return (
        "the package triton is missing, so that networks run by their plain definitions",
        "pip install triton",
    )


def _dali_of_another_cuda(here: Machine) -> Problem | None:
    installed = [
        name for name in ("cuda130", "cuda120") if any(_distributions(f"nvidia-dali-{name}"))
    ]
    if not installed:
        return "DALI is not installed", "pip install 'tetdist[cuda130]' (CUDA 12: cuda120)"
    if len(installed) > 1:
        return (
            "two builds of DALI are installed, which write into one folder",
            "pip uninstall nvidia-dali-cuda130 nvidia-dali-cuda120, then install one of them",
        )
    if not here.on_gpu or torch.version.cuda is None:
        return None
    wanted = f"cuda{torch.version.cuda.partition('.')[0]}0"
    if installed == [wanted]:
        return None
    return (
        f"torch is built for CUDA {torch.version.cuda} and DALI is {installed[0]}",
        f"pip uninstall nvidia-dali-{installed[0]}; pip install 'tetdist[{wanted}]'",
    )


def _no_deepspeed(_: Machine) -> Problem | None:
    if any(_distributions("deepspeed")):
        return None
    return "DeepSpeed is not installed", "pip install 'tetdist[train]', or train with engine=torch"


def _distributions(name: str) -> list[str]:
    try:
        return [importlib.metadata.version(name)]
    except importlib.metadata.PackageNotFoundError:
        return []


def _driver() -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None
