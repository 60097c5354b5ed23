"""Memory and energy that a run uses on its GPUs, read whenever metrics are logged.

Neither reading waits for the GPU's computation.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch

# Memory in GiB and energy in joules; see `values_of`.
Reading = tuple[float, float]


class GPUUsage:
    """Memory and energy of this process's GPU, if it has one."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._is_gpu = device, device.type == "cuda"
        self._nvml: Any = None
        if self._is_gpu:
            self._open_nvml()
        self.restart()

    def _open_nvml(self) -> None:
        with contextlib.suppress(ImportError):
            import pynvml

            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlInit()
                # CUDA numbers only the visible GPUs; NVML numbers all of them.
                uuid = torch.cuda.get_device_properties(self._device).uuid
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
                self._nvml = pynvml

    def _joules(self) -> float:
        """Return the energy since the driver was loaded; NaN if the GPU does not count it."""
        if self._nvml is None:
            return math.nan
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000
        except self._nvml.NVMLError:
            return math.nan

    def restart(self) -> None:
        """Count the energy from now on."""
        self._joules_before = self._joules()

    def reading(self) -> Reading | None:
        """Return this GPU's values since the last `restart`; None without GPUs."""
        if not self._is_gpu:
            return None
        memory = torch.cuda.max_memory_allocated(self._device) / 2**30
        return memory, self._joules() - self._joules_before


def values_of(readings: Sequence[Reading | None]) -> dict[str, float]:
    """Return the metrics of all processes' GPUs; empty without GPUs.

    ``gpu_memory``: the most memory that torch has allocated on one GPU since the process began, in
    GiB. ``gpu_energy``: energy of all GPUs together in joules, including other programs' work on
    them; left out if a GPU cannot measure it (older than Volta, or a part of a GPU).
    """
    on_gpus = [reading for reading in readings if reading is not None]
    if not on_gpus:
        return {}
    memory, joules = map(list, zip(*on_gpus, strict=True))
    energy = {} if math.isnan(sum(joules)) else {"gpu_energy": sum(joules)}
    return {"gpu_memory": max(memory)} | energy
