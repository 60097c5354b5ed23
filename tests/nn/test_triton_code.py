"""Machine code of the GPU's kernels, which compile without a GPU."""

import functools
import json
from pathlib import Path

import pytest
import torch
from kernel_runs import assert_addresses_exist, needs_triton

from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.fast.fused import Inputs
from tetdist.nn.integer_neurons import NILIF
from tetdist.nn.neurons import LIF
from tetdist.nn.parallel_neurons import PSN

needs_triton()

import gpu_code  # noqa: E402  # needs Triton
import triton  # noqa: E402  # needs Triton
from gpu_code import CAPABILITIES, Attention, Layer, Stream  # noqa: E402  # needs Triton

from tetdist.nn.fast import triton_kernels  # noqa: E402  # needs Triton

RECORD = Path(__file__).parents[2] / "docs" / "performance" / "gpu_code.json"
NEWEST = CAPABILITIES[-1]


@functools.cache
def recorded(name, capability):
    """One of the kernels in the record, compiled once for all tests."""
    return gpu_code.compiled(gpu_code.recorded_launches()[name], capability)


def check(code):
    assert code.calls == 0
    assert code.spills == 0
    # No operation with a random order.
    assert "atomic" not in code.intermediate


LARGE = {"timesteps": 16, "rows": 256 * 112 * 112}  # 1.53 * 2^31 numbers
FULL = {"shortcut": "normalized", "identity": True, "carries": True}


def test_no_offset_in_a_large_tensor_overflows(monkeypatch):
    """Sizes have 32 bits if they fit, and a tensor may have more than 2^31 values."""
    monkeypatch.setattr(triton_kernels, "PROGRAMS", dict.fromkeys(triton_kernels.PROGRAMS, 2**30))
    launches = [*gpu_code.pooling(4096), *gpu_code.packing(16384)]
    for part in (
        Layer(**LARGE, **FULL),
        Layer(**LARGE, neuron=PSN(timesteps=16)),
        Stream(**LARGE, normalized=True),
        Attention(timesteps=8, images=4096, carries=True),
    ):
        launches += part.launches()
    large = [one for one in launches if max(x.numel() for x in one.tensors) > 2**31]
    names = ("statistics", "fire", "backward_sums", "backward", "add", "add_sums", "norm_gradient")
    names += ("forward_normalized", "forward", "attend", "current_gradient", "gradients")
    assert {one.name for one in large} == {*names, "unpack", "halve", "unpack_halves"}
    for launch in large:
        assert_addresses_exist(launch)


# Bytes in bfloat16. The kernels are as fast as memory, so each value is read and written once.
BYTES = {
    "statistics": 2,  # x
    "fire": 2 + 2 + 1,  # x; spikes, and the same in bytes
    "fire with identity": 2 + 2 + 2 + 1,
    "backward_sums": 2 + 2,  # x and the gradient of the spikes
    "backward": 2 + 2 + 2,  # and the gradient of x
    "add": 2 + 2 + 2,  # x, the shortcut, the sum
    "add_sums": 2 + 2,  # x and the gradient of the sum
    "norm_gradient": 2 + 2 + 2,  # and that of x
    "fire psn": 2 + 2 + 1,
    "backward_sums psn": 2 + 2,
    "backward psn": 2 + 2 + 2,
    "fire alone": 2 + 2 + 1,
    "backward alone": 2 + 2 + 2,
}
# Whose loops over tiles see no timesteps.
FLAT = ("statistics", "add", "add_sums", "norm_gradient")


# Those of a plain layer on H100; the others take a second each.
EVERY = [pytest.param(one, None, marks=pytest.mark.long) for one in CAPABILITIES]


@pytest.mark.parametrize(("capability", "names"), [(NEWEST, BYTES), *EVERY])
def test_code_is_what_is_recorded(capability, names):
    """A change of a kernel must update the record: `python docs/make/gpu.py`."""
    record = json.loads(RECORD.read_text())
    known = {name.rpartition(" sm_")[0] for name in record["code"]}
    assert known == gpu_code.recorded_launches().keys()
    for name in sorted(names or known):
        code = recorded(name, capability)
        check(code)
        expected = record["code"][f"{name} sm_{capability}"]
        if triton.__version__ == record["triton"]:
            assert {key: getattr(code, key) for key in expected} == expected, name
        else:  # Another version of Triton or the assembler gives roughly the same.
            assert code.instructions < 1.3 * expected["instructions"], name


def test_bytes_of_a_number_and_timestep():
    for name, expected in BYTES.items():
        timesteps = 1 if name in FLAT else 4
        assert recorded(name, NEWEST).bytes_of_number(timesteps) == expected, name


def test_numbers_are_rounded_as_in_cpp():
    """Products and sums one by one, where one instruction could make both; bfloat16 to nearest."""
    rounding = ("fire", "backward", "add", "norm_gradient", "backward alone", "fire psn")
    for name in (*rounding, "statistics", "backward_sums", "add_sums"):
        operations = recorded(name, NEWEST).operations
        assert operations["FADD"] >= 16, name
        assert "FFMA" not in operations, name
        assert ("F2FP" in operations) == (name in rounding), name


class _Driver:
    """Everything that Triton needs from a driver before it launches a kernel."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 0

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)


def test_one_compilation_serves_all_layers(monkeypatch):
    """Triton's own way from the arguments of a call to a compiled kernel, up to its start."""
    used = set()

    def prepare(kernel, grid, arguments, known):
        if kernel not in used:
            kernel.device_caches.clear()
            used.add(kernel)
        options = {"num_warps": triton_kernels.WARPS, "enable_fp_fusion": False}
        kernel.run(*arguments, grid=grid, warmup=True, **(options | known))

    monkeypatch.setattr(triton_kernels, "launch", prepare)
    monkeypatch.setattr(triton.runtime.driver, "_active", _Driver())
    kernels = triton_kernels.NeuronKernels(LIF(), 2, carries=False, packs=True)
    # One row, and as many channels as there are; a multiple of 16, or none.
    for rows, channels in ((100, 64), (1, 128), (16, 256), (7, 512)):
        x, norm = torch.zeros(2, rows, channels).bfloat16(), BatchNorm(channels)
        with torch.no_grad():
            affine = kernels.normalization(norm, x, norm.weight, norm.bias)
            inputs = Inputs(x, None, affine, None, None)
            kernels.spikes(inputs, None)
            sums, _ = kernels.sums(inputs, x, None)
            kernels.gradients(inputs, x, None, None, sums[:2], None, needs_x=True)
            kernels.add(x, x, affine, None)
            kernels.add_sums(x, x, affine, None, x)
            kernels.norm_gradient(x, x, affine, sums[:2])
    # As many heads and positions as there are.
    for heads, side in ((1, 3), (4, 8)):
        x = torch.zeros(2, 1, 16 * heads, side, side, dtype=torch.bfloat16)
        options = {"carries": False, "packs": True}
        attention = triton_kernels.AttentionKernels(LIF(), x, x, heads, 0.5, **options)
        rows = x.new_zeros(2, side * side, 16 * heads)
        inputs = Inputs((rows.byte(),) * 3, None, None, None, None)
        attention.spikes(inputs, None)
        attention.current_gradient(inputs, rows, None)
    numbers = {kernel.fn.__name__: len(kernel.device_caches[0][0]) for kernel in used}
    for kernel in used:
        # What was compiled for no GPU is not for one that is there.
        kernel.device_caches.clear()
    assert len(numbers) == 12
    assert set(numbers.values()) == {1}, numbers


# Those that need the most registers.
LARGEST = [
    Layer(timesteps=16, neuron=PSN(timesteps=16), identity=True),
    Attention(
        neuron=NILIF(most_spikes=8), channels=24, values=96, carries=True, dtype=torch.float16
    ),
]


@pytest.mark.parametrize("layer", LARGEST)
def test_nothing_spills(layer):
    names = ("fire", "backward_sums", "backward", "attend", "current_gradient", "gradients")
    for launch in layer.launches():
        if launch.name in names:
            check(gpu_code.compiled(launch, NEWEST))
