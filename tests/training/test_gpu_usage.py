"""Memory and energy of GPUs among the metrics, with a stand-in for the driver's library."""

import math
import sys
import types

import pytest
import torch

from tetdist.training.gpu_usage import GPUUsage, values_of

CUDA = torch.device("cuda:0")


class NVML(types.ModuleType):
    """A driver that counts millijoules, and knows one GPU by its UUID."""

    class NVMLError(Exception):
        pass

    millijoules: int | None = 5_000_000

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == "GPU-0123"
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        assert handle == "handle"
        if self.millijoules is None:
            raise self.NVMLError("not supported")
        return self.millijoules


@pytest.fixture
def nvml(monkeypatch):
    nvml = NVML("pynvml")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    properties = types.SimpleNamespace(uuid="0123")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 3 * 2**30)
    return nvml


def test_energy_is_that_of_all_gpus_since_the_line_before(nvml):
    usage, other = GPUUsage(CUDA), (4.5, 100.0)
    nvml.millijoules = 5_250_000
    assert values_of([usage.reading(), other]) == {"gpu_memory": 4.5, "gpu_energy": 350.0}
    nvml.millijoules = 6_000_000  # an evaluation
    usage.restart()
    nvml.millijoules = 6_010_000
    assert values_of([usage.reading(), other])["gpu_energy"] == 110.0


def test_a_gpu_that_counts_no_energy_leaves_it_out(nvml):
    assert values_of([GPUUsage(CUDA).reading(), (1.0, math.nan)]) == {"gpu_memory": 3.0}
    nvml.millijoules = None
    assert values_of([GPUUsage(CUDA).reading(), (1.0, 7.0)]) == {"gpu_memory": 3.0}


def test_a_cpu_has_neither():
    assert values_of([GPUUsage(torch.device("cpu")).reading()]) == {}
