"""Memory and energy that a run uses on its GPUs, asked of the driver where metrics are logged.

Neither question waits for what the GPU is computing.
"""

import contextlib
from typing import Any

import torch

from tetdist.distributed.world import World


class GPUUsage:
    """Memory and energy of all processes' GPUs; without GPUs there is nothing to say.

    Args:
        world: The processes. All ask at the same time.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._energy = _EnergyCounter(world.device) if world.device.type == "cuda" else None
        self._joules_before = 0.0
        self.restart()

    def restart(self) -> None:
        """Count the energy from now on."""
        if self._energy is not None:
            self._joules_before = self._energy.joules() or 0.0

    def values(self) -> dict[str, float]:
        """Metrics since the last call or `restart`; empty without GPUs.

        ``gpu_memory`` is the most that torch has allocated on one GPU since the process began, in
        GiB; ``gpu_energy`` what all GPUs took together, in joules, others' work on them included.
        It is left out where one of them cannot tell (older than Volta, or a part of one).
        """
        if self._energy is None:
            return {}
        memory = torch.cuda.max_memory_allocated(self._world.device) / 2**30
        now = self._energy.joules()
        joules = None if now is None else now - self._joules_before
        self._joules_before = now or 0.0
        of_all = self._world.gather([memory, joules])
        values = {"gpu_memory": max(memory for memory, _ in of_all)}
        if all(joules is not None for _, joules in of_all):
            values["gpu_energy"] = sum(joules for _, joules in of_all)
        return values


class _EnergyCounter:
    """The energy that a GPU has taken since its driver was loaded, by NVML."""

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = None
        with contextlib.suppress(ImportError):
            import pynvml

            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlInit()
                # CUDA counts the GPUs that it is shown; NVML all of them.
                uuid = torch.cuda.get_device_properties(device).uuid
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
                self._nvml = pynvml

    def joules(self) -> float | None:
        """None where the GPU does not count it."""
        if self._nvml is None:
            return None
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000
        except self._nvml.NVMLError:
            return None
