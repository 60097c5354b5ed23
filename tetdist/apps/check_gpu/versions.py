"""Check of versions: driver, torch, Triton, NCCL, DALI, DeepSpeed and others."""

import contextlib
import importlib.metadata
import os
import re
import shutil
import statistics
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

from tetdist.apps.check_gpu import remedies
from tetdist.apps.check_gpu.check import Finding, Machine
from tetdist.errors import pip_install
from tetdist.tracking.environment import environment, versions


def check_versions(here: Machine) -> Finding:
    """Check packages and driver; report the first mismatch with the command that fixes it."""
    same, text = dict(versions()), f"torch {torch.__version__}"
    if here.on_gpu:
        same["gpu"] = torch.cuda.get_device_properties(here.world.device).name
        same["nccl"] = ".".join(map(str, torch.cuda.nccl.version()[:3]))
        same |= {"cudnn": str(torch.backends.cudnn.version()), "driver": "unknown"}
        # There is none, for instance, in a container with only the libraries.
        with contextlib.suppress(OSError, subprocess.CalledProcessError, IndexError):
            same["driver"] = remedies.smi("driver_version").splitlines()[0].strip()
        text = f"{same['gpu']}, driver {same['driver']}, {text}, NCCL {same['nccl']}"
    numbers = environment() | same | {"torch_cuda": torch.version.cuda}
    unlike = _unlike(same, here.world.gather(same))
    for wrong, remedy in (*_misfits(here, same.get("nccl")), *unlike):
        return Finding("bad", wrong, remedy, numbers)
    return Finding("ok", text, None, numbers)


def _unlike(own: dict[str, str], all_of_them: list[dict[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield what is not as on most processes, with the remedy."""
    for name in dict.fromkeys(name for one in all_of_them for name in one):
        usual = statistics.mode(one.get(name) for one in all_of_them)
        if own.get(name) != usual:
            yield f"{name} is {own.get(name)}, but {usual} on other processes", remedies.UNLIKE


def _misfits(here: Machine, nccl: str | None) -> Iterator[tuple[str, str]]:
    """Yield problems with their remedies, those first that cause others."""
    this_torch, cuda = f"torch {torch.__version__}", torch.version.cuda or "13"
    installed = {one.name: one.version for one in importlib.metadata.distributions()}
    if here.on_gpu:
        major, minor = torch.cuda.get_device_capability(here.world.device)
        built = [arch.removeprefix("sm_") for arch in torch.cuda.get_arch_list() if "sm_" in arch]
        # A GPU runs code built for its major version and an equal or smaller minor version.
        if not any(int(x[:-1]) == major and int(x[-1:]) <= minor for x in built if x.isdigit()):
            text = f"{this_torch} is built for sm_{', sm_'.join(built)}"
            right = remedies.torch_for(remedies.driver_and_gpu()[0], (major, minor))
            yield f"{text}, but this GPU is sm_{major}{minor}", right
        triton = installed.get("triton")
        needs = "\n".join(importlib.metadata.requires("torch") or ())
        required = re.search(r"^triton\s*\(?==([\w.]+)", needs, re.MULTILINE)
        if not triton or (required and required[1] != triton):
            exact = f"=={required[1]}" if required else ""
            text = f"{this_torch} needs triton{exact}, but {triton or 'none'} is installed"
            yield text, f"pip install 'triton{exact}'"
        if not any(shutil.which(name) for name in (os.environ.get("CC") or "gcc", "clang")):
            yield "there is no C compiler, which Triton needs", "apt-get install gcc"
        if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
            yield "Python.h is missing, which Triton needs", "apt-get install python3-dev"
    if here.on_gpu and here.world.world_size > 1:
        own = installed.get("nvidia-nccl-cu13") or installed.get("nvidia-nccl-cu12")
        if own and own != nccl:
            path = os.environ.get("LD_LIBRARY_PATH")
            text = f"NCCL {nccl} is loaded, but torch installed {own} (LD_LIBRARY_PATH={path})"
            yield text, "unset LD_LIBRARY_PATH, or remove the folder of the other NCCL from it"
    dali = [one for one in ("cuda130", "cuda120") if f"nvidia-dali-{one}" in installed]
    right = f"cuda{cuda.partition('.')[0]}0"
    install = pip_install(right)
    if not dali:
        yield "DALI is not installed", install
    elif len(dali) > 1 or (here.on_gpu and dali != [right]):
        text = f"torch is built for CUDA {cuda}, but DALI for {' and '.join(dali)}"
        remove = "pip uninstall -y nvidia-dali-cuda130 nvidia-dali-cuda120"
        yield text, f"{remove}; {install}"
    if "deepspeed" not in installed:
        yield "DeepSpeed is not installed", f"{pip_install('train')}; or train with engine=torch"
