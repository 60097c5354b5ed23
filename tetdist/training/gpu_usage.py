"""Memory and energy that a run uses on its GPUs, read whenever metrics are logged.

Neither reading waits for the GPU's computation.
"""

import contextlib
from typing import Any

import torch

from tetdist.distributed.world import World


class GPUUsage:
    """Memory and energy of all processes' GPUs; empty without GPUs.

    Args:
        world: The processes; all must call the methods together.
    """

    def __init__(self, world: World) -> None:
        self._world, self._is_gpu = world, world.device.type == "cuda"
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
                uuid = torch.cuda.get_device_properties(self._world.device).uuid
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
                self._nvml = pynvml

    def _joules(self) -> float | None:
        """Return the energy since the driver was loaded; None if the GPU does not count it."""
        if self._nvml is None:
            return None
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000
        except self._nvml.NVMLError:
            return None

    def restart(self) -> None:
        """Count the energy from now on."""
        self._joules_before = self._joules()

    def values(self) -> dict[str, float]:
        """Return the metrics since the last `restart`; empty without GPUs.

        ``gpu_memory``: the most memory that torch has allocated on one GPU since the process began,
        in GiB. ``gpu_energy``: energy of all GPUs together in joules, including other programs'
        work on them; left out if a GPU cannot measure it (older than Volta, or a part of a GPU).
        """
        if not self._is_gpu:
            return {}
        before, now = self._joules_before, self._joules()
        joules = None if before is None or now is None else now - before
        memory = torch.cuda.max_memory_allocated(self._world.device) / 2**30
        of_all = self._world.gather([memory, joules])
        values = {"gpu_memory": max(memory for memory, _ in of_all)}
        if all(joules is not None for _, joules in of_all):
            values["gpu_energy"] = sum(joules for _, joules in of_all)
        return values
