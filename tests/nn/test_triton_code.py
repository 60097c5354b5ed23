"""Machine code of the GPU's kernels, which compile without a GPU."""

import functools
import itertools
import json
from pathlib import Path

import pytest
import torch
from kernel_runs import assert_addresses_exist, needs_triton

from tetdist.models.attention import HALVING_NEURON
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.fast.fused import Inputs
from tetdist.nn.integer_neurons import NILIF
from tetdist.nn.learned_decay import PLIF
from tetdist.nn.neurons import LIF
from tetdist.nn.parallel_neurons import PSN, SlidingPSN
from tetdist.nn.surrogates import SURROGATES

needs_triton()

import gpu_code  # noqa: E402  # needs Triton
import triton  # noqa: E402  # needs Triton
from gpu_code import CAPABILITIES, Attention, Layer, Stream  # noqa: E402  # needs Triton

from tetdist.nn.fast import triton_kernels  # noqa: E402  # needs Triton

RECORD = Path(__file__).parents[2] / "docs" / "performance" / "gpu_code.json"
*OLDER, NEWEST = CAPABILITIES
GPUS = [*(pytest.param(older, marks=pytest.mark.long) for older in OLDER), NEWEST]
each_gpu = pytest.mark.parametrize("capability", GPUS, ids="sm_{}".format)


@functools.cache
def recorded(name, capability):
    """One of the kernels in the record, compiled once for all tests."""
    return gpu_code.compiled(gpu_code.recorded_launches()[name], capability)


def check(code, *, spills=False):
    assert code.calls == 0
    assert spills or code.spills == 0
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


# Those of a plain layer; the others take a second each.
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


def test_of_any_number_of_channels_and_timesteps():
    # Loads as wide as rows allow: 24 channels are a multiple of 8 numbers, 3 of none; and as wide
    # as registers for 16 timesteps allow.
    for channels, timesteps, name, width in (
        (24, 2, "fire", "LDG.128"),
        (3, 2, "fire", "LDG.16"),
        (64, 16, "backward", "LDG.64"),
    ):
        (code,) = (
            gpu_code.compiled(launch, 90)
            for launch in Layer(timesteps=timesteps, channels=channels).launches()
            if launch.name == name
        )
        check(code)
        assert code.memory[width] >= 2


UNCARRIED = FULL | {"carries": False}
USUAL = [
    Layer(channels=130, timesteps=16, **UNCARRIED),
    Layer(timesteps=16, neuron=PSN(timesteps=16), identity=True),
]
FURTHER = [
    Layer(neuron=PLIF(), **UNCARRIED),
    Layer(neuron=PLIF(reset="soft", decay_input=False), **UNCARRIED),
    Layer(neuron=NILIF(), **UNCARRIED),
    Layer(neuron=SlidingPSN(order=3), **FULL),
    Layer(channels=3, **FULL),
]
for dtype in (torch.bfloat16, torch.float32):
    for timesteps in (1, 10, 12, 16):
        FURTHER += [
            Layer(dtype=dtype, timesteps=timesteps, shortcut="normalized", carries=True),
            Layer(dtype=dtype, timesteps=timesteps, carries=True),
            Stream(dtype=dtype, timesteps=timesteps),
            Layer(dtype=dtype, timesteps=timesteps, neuron=PSN(timesteps=timesteps)),
            Stream(dtype=dtype, timesteps=timesteps, neuron=SlidingPSN()),
            Layer(dtype=dtype, timesteps=timesteps, neuron=SlidingPSN(), carries=True),
        ]
RESETS = itertools.cycle(("hard", "soft"))
DTYPES = (torch.float16, torch.bfloat16, torch.float64)
for surrogate, dtype in itertools.product(SURROGATES, DTYPES):
    neuron = LIF(surrogate=surrogate, surrogate_width=1.5, decay=0.9, reset=next(RESETS))
    layer = {"neuron": neuron, "dtype": dtype, "timesteps": 8, "shortcut": "plain"}
    FURTHER += [Layer(**layer, carries=True), Layer(**layer, shared=True)]
for dtype in (torch.bfloat16, torch.float64):
    # With everything that there can be, on any number of channels.
    full = {"dtype": dtype, "timesteps": 2, "shared": True, "normalized": True}
    FURTHER += [Stream(channels=channels, **full) for channels in (64, 3)]


ATTENTION = {"carries": True, "dtype": torch.float16}
FURTHER.append(Attention(packed=False))
USUAL.append(Attention(neuron=NILIF(most_spikes=8), channels=24, values=96, **ATTENTION))
FURTHER += [
    Attention(neuron=neuron, timesteps=timesteps, positions=positions, **ATTENTION)
    for neuron in (PLIF(surrogate="sigmoid"), NILIF(most_spikes=8), HALVING_NEURON)
    for timesteps, positions in ((1, 300), (4, 196), (8, 49), (8, 196))
]


@each_gpu
@pytest.mark.parametrize(
    "layer", [*USUAL, *(pytest.param(layer, marks=pytest.mark.long) for layer in FURTHER)]
)
def test_nothing_spills(layer, capability):
    adds = isinstance(layer, Stream) and layer.shared
    names = ("fire", "backward_sums", "backward")
    if adds:
        names = ("add", "add_sums")
    elif isinstance(layer, Attention):
        names = ("attend", "current_gradient", "gradients")
    # The assembler spills a number of float64 where it has three times the registers.
    spills = not adds and layer.dtype == torch.float64
    for launch in layer.launches():
        if launch.name in names:
            check(gpu_code.compiled(launch, capability), spills=spills)
