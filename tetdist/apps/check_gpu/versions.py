"""Check of versions: driver, torch, Triton, NCCL, DALI, DeepSpeed and others."""

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tetdist.apps.check_gpu import remedies
from tetdist.apps.check_gpu.check import Finding, Machine
from tetdist.errors import pip_install
from tetdist.tracking.environment import versions


def check_versions(here: Machine) -> Finding:
    """Check packages and driver; report the first mismatch with the command that fixes it."""
    packages = versions()
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "packages": packages,
        "torch_cuda": torch.version.cuda,
    }
    same: dict[str, Any] = dict(packages)
    text = f"torch {torch.__version__}"
    if here.on_gpu:
        properties = torch.cuda.get_device_properties(here.device)
        try:
            driver = remedies.smi("driver_version").splitlines()[0].strip()
        except subprocess.TimeoutExpired:
            text = f"nvidia-smi does not answer within {remedies.SMI_TIMEOUT} s"
            return Finding("bad", text, remedies.HANGING_DRIVER, found)
        except (OSError, subprocess.SubprocessError, IndexError):
            driver = "unknown"  # for instance in a container with only the libraries
        same |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": driver,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "cudnn": torch.backends.cudnn.version(),
        }
        memory = round(properties.total_memory / 2**30, 1)
        found |= same | {"gpu_memory_gib": memory, "gpu_uuid": str(properties.uuid)}
        text = f"{found['gpu']}, driver {driver}, {text}, NCCL {found['nccl']}"
    for misfit in (*_GPU_MISFITS, *_MISFITS) if here.on_gpu else _MISFITS:
        problem = misfit(here)
        if problem is not None:
            wrong, remedy = problem
            return Finding("bad", wrong, remedy, found)
    return Finding("ok", text, None, found, same=same)


Problem = tuple[str, str]  # problem and remedy


def _foreign_architecture(here: Machine) -> Problem | None:
    major, minor = torch.cuda.get_device_capability(here.device)
    built = [name.removeprefix("sm_") for name in torch.cuda.get_arch_list() if "sm_" in name]
    # A GPU runs code built for its major version and an equal or smaller minor version.
    if any(int(one[:-1]) == major and int(one[-1:]) <= minor for one in built if one.isdigit()):
        return None
    driver, _ = remedies.driver_and_gpu()
    return (
        f"torch {torch.__version__} is built for sm_{', sm_'.join(built)}, but this GPU is "
        f"sm_{major}{minor}",
        remedies.torch_for(driver, (major, minor)),
    )


def _no_triton(_: Machine) -> Problem | None:
    wanted = _named_by_torch("triton")
    package = f"triton{wanted}" if wanted else "triton"
    if importlib.util.find_spec("triton") is None:
        text = "the package triton is missing, so networks run by their plain definitions"
        return text, f"pip install '{package}'"
    oldest = importlib.import_module("tetdist.nn.fast.triton_kernels").OLDEST
    for version in _distributions("triton"):
        if tuple(map(int, version.split(".")[:2])) < oldest:
            text = f"Triton {version} is older than {'.'.join(map(str, oldest))}"
            return text, remedies.torch_for(*remedies.driver_and_gpu())
        if wanted and wanted != f"=={version}":
            text = f"Triton {version} is installed, but torch {torch.__version__} needs {wanted}"
            return text, f"pip install '{package}'"
    return None


def _no_compiler(_: Machine) -> Problem | None:
    """Report what Triton lacks to build the code by which Python launches a kernel."""
    if not any(shutil.which(name) for name in (os.environ.get("CC") or "gcc", "clang")):
        return "there is no C compiler, which Triton needs", "apt-get install gcc"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python.h is missing, which Triton needs", "apt-get install python3-dev"
    return None


def _foreign_nccl(here: Machine) -> Problem | None:
    if here.world.world_size == 1:
        return None
    if not dist.is_nccl_available():
        text = f"torch {torch.__version__} is built without NCCL"
        return text, remedies.torch_for(*remedies.driver_and_gpu())
    loaded = ".".join(map(str, torch.cuda.nccl.version()[:3]))
    own = [version for cuda in (13, 12) for version in _distributions(f"nvidia-nccl-cu{cuda}")]
    if not own or loaded in own:
        return None
    path = os.environ.get("LD_LIBRARY_PATH")
    text = f"NCCL {loaded} is loaded, but torch installed {own[0]} (LD_LIBRARY_PATH={path})"
    return text, "unset LD_LIBRARY_PATH, or remove the folder of the other NCCL from it"


def _dali_of_another_cuda(here: Machine) -> Problem | None:
    builds = [f"nvidia-dali-{name}" for name in ("cuda130", "cuda120")]
    installed = [build for build in builds if _distributions(build)]
    major = (torch.version.cuda or "13").partition(".")[0]
    install = pip_install(f"cuda{major}0")
    instead = f"pip uninstall -y {' '.join(installed)}; {install}"
    if not installed:
        return "DALI is not installed", install
    if len(installed) > 1:
        return "two builds of DALI are installed, which overwrite each other", instead
    if not here.on_gpu or torch.version.cuda is None or installed[0].endswith(f"cuda{major}0"):
        return None
    dali = installed[0].removeprefix("nvidia-dali-")
    return f"torch is built for CUDA {torch.version.cuda}, but DALI for {dali}", instead


def _no_deepspeed(_: Machine) -> Problem | None:
    if any(_distributions("deepspeed")):
        return None
    install = pip_install("train,cuda130")
    return "DeepSpeed is not installed", f"{install}; or train with engine=torch"


# Ordered so that the first problem explains later ones.
_GPU_MISFITS = (_foreign_architecture, _no_triton, _no_compiler, _foreign_nccl)
_MISFITS = (_dali_of_another_cuda, _no_deepspeed)


def _distributions(name: str) -> list[str]:
    try:
        return [importlib.metadata.version(name)]
    except importlib.metadata.PackageNotFoundError:
        return []


def _named_by_torch(package: str) -> str:
    """Return the version of a package that torch requires, as ``==3.6.0``; empty: any or none."""
    for line in importlib.metadata.requires("torch") or ():
        if found := re.match(rf"{package}\s*\(?(==[\w.]+)", line):
            return found[1]
    return ""
