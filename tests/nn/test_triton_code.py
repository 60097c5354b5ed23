"""Machine code of the GPU's kernels, which compile without a GPU."""

import re

import pytest
import torch
from kernel_runs import assert_addresses_exist, needs_triton

from tetdist.nn.integer_neurons import NILIF
from tetdist.nn.parallel_neurons import PSN

needs_triton()

import gpu_code  # noqa: E402  # needs Triton
from gpu_code import CAPABILITIES, attention, neurons, stream  # noqa: E402  # needs Triton

from tetdist.nn.fast import triton_kernels  # noqa: E402  # needs Triton

NEWEST = CAPABILITIES[-1]
# Of a call, which a function has, since the assembler also jumps by this instruction; of a product
# and a sum in one, which C++ rounds one by one; of what did not fit into registers.
UNWANTED = re.compile(r"\bCALL\.[^;]*\$|\bFFMA\b|\bLDL\b|\bSTL\b")


def check(launches, capability, *, fuses=False):
    """See that nothing is called, spilt, or summed in a random order; each kernel is seen once.

    Through a matrix of weights gradients are sums of products, which ``fuses`` allows in one.
    """
    for launch in {launch.name: launch for launch in launches}.values():
        asm = gpu_code.compiled(launch, capability)
        code = gpu_code.disassembled(asm["cubin"])
        assert "atomic" not in asm["ttir"], launch.name
        assert "EXIT" in code  # so its instructions have these names
        allowed = {"FFMA"} if fuses and launch.name in ("backward_sums", "backward") else set()
        assert set(UNWANTED.findall(code)) <= allowed, launch.name


LARGE = {"timesteps": 16, "images": 256, "side": 112}  # 1.53 * 2^31 numbers


def test_no_offset_in_a_large_tensor_overflows(monkeypatch):
    """Sizes have 32 bits if they fit, and a tensor may have more than 2^31 values."""
    monkeypatch.setattr(triton_kernels, "PROGRAMS", dict.fromkeys(triton_kernels.PROGRAMS, 2**30))
    launches = [*gpu_code.pooling(4096), *gpu_code.packing(32768)]
    launches += neurons(full=True, **LARGE) + neurons(PSN(timesteps=16), **LARGE)
    launches += stream(shortcut="normalised", **LARGE)
    # Each timestep has 2^31 numbers, and more.
    launches += stream(timesteps=2, images=4096, side=112, shortcut="shared")
    launches += attention(timesteps=2, images=32768, carries=True)
    large = [one for one in launches if max(x.numel() for x in one.tensors) > 2**31]
    names = ("statistics", "fire", "backward_sums", "backward", "add", "add_sums", "norm_gradient")
    names += ("forward_normalized", "forward", "attend", "current_gradient", "gradients")
    assert {one.name for one in large} == {*names, "unpack", "halve", "unpack_halves"}
    for launch in large:
        assert_addresses_exist(launch)
    with pytest.raises(AssertionError):
        stream(images=2**16, side=91)  # 1.01 * 2^31 rows


# The last two need the most registers.
PARTS = {
    "plain": neurons,
    "stream": stream,
    "most timesteps": lambda: neurons(PSN(timesteps=16), timesteps=16),
    "most values": lambda: attention(
        NILIF(most_spikes=8), channels=24, values=96, carries=True, dtype=torch.float16
    ),
}
MORE = {
    "full": lambda: neurons(full=True),
    "parallel": lambda: neurons(PSN(timesteps=4)),
    "attention": attention,
}
CASES = [pytest.param(name, NEWEST, id=name) for name in PARTS]
CASES += [
    pytest.param(name, capability, id=f"{name} {capability}", marks=pytest.mark.long)
    for name in PARTS | MORE
    for capability in CAPABILITIES
]


@pytest.mark.parametrize(("name", "capability"), CASES)
def test_nothing_spills_and_no_order_is_random(name, capability):
    launches = (PARTS | MORE)[name]()
    check(launches, capability, fuses=name in ("parallel", "most timesteps"))


@pytest.mark.long
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_nothing_of_pooling_and_packing_spills(capability):
    check([*gpu_code.pooling(), *gpu_code.packing()], capability)


def test_one_compilation_serves_all_layers():
    """Triton compiles anew for other constants, and for a number that is 1 or divides by 16."""
    usual = neurons()
    for first, other in zip(usual, neurons(channels=128, side=1), strict=True):
        assert first.known == other.known, first.name
    for launch in usual + stream() + attention():
        for parameter, value in zip(launch.kernel.params, launch.arguments, strict=False):
            assert parameter.do_not_specialize or not isinstance(value, int), launch.name
