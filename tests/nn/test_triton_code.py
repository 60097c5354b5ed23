"""Machine code of the GPU's kernels, which compile without a GPU."""

import re

import pytest
import torch
from kernel_runs import assert_addresses_exist, needs_triton

from tetdist.nn.integer_neurons import NILIF
from tetdist.nn.parallel_neurons import PSN

needs_triton()

import gpu_code  # noqa: E402  # needs Triton
from gpu_code import CAPABILITIES, Attention, Layer, Stream  # noqa: E402  # needs Triton

from tetdist.nn.fast import triton_kernels  # noqa: E402  # needs Triton

NEWEST = CAPABILITIES[-1]
# Of a call, which a function has, since the assembler also jumps by this instruction; of a product
# and a sum in one, which C++ rounds one by one; of what did not fit into registers.
UNWANTED = re.compile(r"\bCALL\.[^;]*\$|\bFFMA\b|\bLDL\b|\bSTL\b")


def check(launches, capability, fuses=()):
    """See that nothing is called, spilt, or summed in a random order; each kernel is seen once.

    Kernels named in ``fuses`` may make a product and a sum in one.
    """
    for launch in {launch.name: launch for launch in launches}.values():
        intermediate, code = gpu_code.compiled(launch, capability)
        assert "atomic" not in intermediate, launch.name
        assert "EXIT" in code  # so its instructions have these names
        allowed = {"FFMA"} if launch.name in fuses else set()
        assert set(UNWANTED.findall(code)) <= allowed, launch.name


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


PARTS = {
    "plain": Layer(),
    "full": Layer(**FULL),
    "parallel": Layer(neuron=PSN(timesteps=4)),
    "stream": Stream(),
    "attention": Attention(),
}
# Those that need the most registers.
LARGEST = {
    "most timesteps": Layer(timesteps=16, neuron=PSN(timesteps=16), identity=True),
    "most values": Attention(
        neuron=NILIF(most_spikes=8), channels=24, values=96, carries=True, dtype=torch.float16
    ),
}
CASES = [pytest.param(LARGEST[name], NEWEST, id=name) for name in LARGEST]
CASES += [pytest.param(PARTS[name], NEWEST, id=name) for name in ("plain", "stream")]
CASES += [
    pytest.param(part, capability, id=f"{name} {capability}", marks=pytest.mark.long)
    for name, part in (PARTS | LARGEST).items()
    for capability in CAPABILITIES
]


@pytest.mark.parametrize(("part", "capability"), CASES)
def test_nothing_spills_and_no_order_is_random(part, capability):
    # Through a matrix of weights, gradients are sums of products.
    fuses = ("backward_sums", "backward") if isinstance(part.neuron, PSN) else ()
    check(part.launches(), capability, fuses)


@pytest.mark.long
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_nothing_of_pooling_and_packing_spills(capability):
    check([*gpu_code.pooling(), *gpu_code.packing()], capability)


def test_one_compilation_serves_all_layers():
    """Triton compiles anew for other constants, and for a number that is 1 or divides by 16."""
    layers = [Layer(rows=rows, channels=channels) for rows, channels in ((100, 64), (1, 128))]
    for first, other in zip(*(layer.launches() for layer in layers), strict=True):
        assert first.known == other.known, first.name
    for launch in layers[0].launches() + Stream().launches() + Attention().launches():
        for parameter, value in zip(launch.kernel.params, launch.arguments, strict=False):
            assert parameter.do_not_specialize or not isinstance(value, int), launch.name
