"""Memory and energy of GPUs among the metrics, with a stand-in for the driver's library."""

import sys
import types
from typing import Any

import pytest
import torch

from tetdist.training.gpu_usage import GPUUsage


def world_on(device: str, others: list[list[float | None]]) -> Any:
    """A process whose peers answer what they are given."""

    def gather(value: list[float | None]) -> list[list[float | None]]:
        return [value, *others]

    return types.SimpleNamespace(device=torch.device(device), gather=gather)


class NVML(types.ModuleType):
    """A driver that counts millijoules, and knows one GPU by its UUID."""

    class NVMLError(Exception):
        pass

    millijoules: int | None = 5_000_000

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid == "GPU-0123"
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == "handle"
        if self.millijoules is None:
            raise self.NVMLError("not supported")
        return self.millijoules


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> NVML:
    nvml = NVML("pynvml")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    properties = types.SimpleNamespace(uuid="0123")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 3 * 2**30)
    return nvml


def test_energy_is_that_of_all_gpus_since_the_line_before(nvml: NVML) -> None:
    usage = GPUUsage(world_on("cuda:0", [[4.5, 100.0]]))
    nvml.millijoules = 5_250_000
    assert usage.values() == {"gpu_memory": 4.5, "gpu_energy": 350.0}
    nvml.millijoules = 6_000_000  # an evaluation
    usage.restart()
    nvml.millijoules = 6_010_000
    assert usage.values()["gpu_energy"] == 110.0


def test_a_gpu_that_counts_no_energy_leaves_it_out(nvml: NVML) -> None:
    assert GPUUsage(world_on("cuda:0", [[1.0, None]])).values() == {"gpu_memory": 3.0}
    nvml.millijoules = None
    assert GPUUsage(world_on("cuda:0", [[1.0, 7.0]])).values() == {"gpu_memory": 3.0}


def test_a_cpu_has_neither() -> None:
    assert GPUUsage(world_on("cpu", [])).values() == {}
