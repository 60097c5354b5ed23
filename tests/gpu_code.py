"""The machine code that the Triton kernels become on a GPU, read without a GPU.

Layers run on tensors without contents, and each launch is noted instead of done; Triton compiles
what was noted for a GPU of a given kind, and brings assembler and disassembler.
"""

import contextlib
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from kernel_runs import not_native
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.fast import dispatch, triton_kernels
from tetdist.nn.neurons import LIF, NeuronConfig
from tetdist.nn.norm_neuron import Neuron, NormAdd, NormNeuron, carrying_membranes
from tetdist.nn.norm_pool import NormPool
from tetdist.nn.packed import MaxPool, Packed, halve, pack, with_packed
from tetdist.nn.products import LinearAttention

CAPABILITIES = (80, 90)  # A100, H100
_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Launch:
    """A kernel that a pass would have started, on tensors without contents."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Tensor | int | None, ...]
    known: dict[str, Any]  # constants, and how to compile

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def tensors(self) -> list[Tensor]:
        return [one for one in self.arguments if isinstance(one, Tensor)]


@contextlib.contextmanager
def noted() -> Iterator[list[Launch]]:
    """Note launches, in this context, instead of doing them."""
    launches: list[Launch] = []

    def note(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **known: Any) -> None:
        assert not warmup
        launches.append(Launch(kernel, grid, arguments, known))

    with mock.patch.object(JITFunction, "run", note):
        yield launches


def launches(call: Callable[[], Tensor]) -> list[Launch]:
    """Return the launches of a function's operations and of their backward pass."""
    with FakeTensorMode(), not_native(), pytest.MonkeyPatch.context() as patch, noted() as launches:
        patch.setattr(dispatch, "triton_for", lambda *_: triton_kernels)
        result = call()
        if result.requires_grad:
            result.backward(torch.ones_like(result))
    return launches


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Numbers (T, B, C, H, W), channels last in memory."""
    *lead, channels, height, width = shape
    return torch.empty(*lead, height, width, channels, dtype=dtype).movedim(-1, -3).requires_grad_()


def neurons(
    neuron: NeuronConfig = LIF(),  # noqa: B008  # frozen
    *,
    timesteps: int = 4,
    images: int = 32,
    channels: int = 64,
    side: int = 56,
    full: bool = False,
) -> list[Launch]:
    """Neurons behind a norm, with a normalised shortcut, added spikes and membranes if ``full``.

    The default sizes are those of SEW-ResNet-34's first stage.
    """
    shape = (images, channels, side, side)

    def call() -> Tensor:
        layer, norm = NormNeuron(channels, neuron), BatchNorm(channels)
        added: tuple[Any, ...] = ()
        if full:
            spikes = numbers(timesteps, *shape)
            added = (numbers(timesteps, *shape), with_packed(spikes, pack(spikes)), norm)
        starts = [numbers(*shape, dtype=torch.float32)] if full else None
        with carrying_membranes([layer] if full else [], starts) as ends:
            spikes = layer(numbers(timesteps, *shape), timesteps, *added)
            return sum((end.sum() for end in ends()), spikes.sum())

    return launches(call)


def stream(
    *, timesteps: int = 4, images: int = 32, side: int = 56, shortcut: str = ""
) -> list[Launch]:
    """A norm, a shortcut that is added, perhaps "normalised" or "shared" by all timesteps, and
    neurons without a norm: of membrane shortcuts."""

    def call() -> Tensor:
        times = timesteps, 1 if shortcut == "shared" else timesteps
        x, added = (numbers(count, images, 64, side, side) for count in times)
        norm = BatchNorm(64) if shortcut == "normalised" else None
        return Neuron(LIF(), 64)(NormAdd(64)(x, added, norm)).sum()

    return launches(call)


def attention(
    neuron: NeuronConfig = LIF(),  # noqa: B008  # frozen
    *,
    channels: int = 64,
    values: int = 64,
    timesteps: int = 4,
    images: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    carries: bool = False,
) -> list[Launch]:
    """Attention and the neurons behind it; by default of QKFormer's last stage.

    Args:
        channels: Of a head, in queries and keys; in values it has ``values``.
    """

    def call() -> Tensor:
        widths = (6 * channels, 6 * channels, 6 * values)
        q, k, v = (numbers(timesteps, images, one, 14, 14, dtype=dtype) for one in widths)
        layer = Neuron(neuron)
        starts = [torch.empty_like(v[0], dtype=torch.float32)] if carries else None
        with carrying_membranes([layer] if carries else [], starts) as ends:
            inputs = (with_packed(x, pack(x)) for x in (q, k, v))
            spikes = LinearAttention(6, 0.125).fired(*inputs, layer)
            return sum((end.sum() for end in ends()), spikes.sum())

    return launches(call)


def pooling(images: int = 128) -> list[Launch]:
    """Max-pooling: of spikes, and of a current behind its norm."""

    def spikes() -> Tensor:
        x = numbers(1, images, 64, 112, 112)
        return MaxPool(3, 2, 1)(with_packed(x, pack(x)))

    return launches(spikes) + launches(lambda: NormPool(64)(numbers(1, images, 64, 112, 112)))


def packing(images: int = 128) -> list[Launch]:
    """What unpacks bytes, packs them in halves, and unpacks halves."""

    def call() -> Tensor:
        packed = Packed(numbers(images, 64, 56, 56).to(torch.uint8), 4)
        return packed.unpack(torch.bfloat16) + halve(packed).numbers(torch.bfloat16)

    return launches(call)


def compiled(launch: Launch, capability: int) -> dict[str, Any]:
    """Compile a kernel as it would be for this launch, for a GPU of a kind (80, 90).

    Returns:
        Its code in each of Triton's languages, such as "ttir" and "cubin".
    """
    constants, attributes = dict(launch.known), {}
    options = {name: constants.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    signature = dict.fromkeys(launch.kernel.arg_names, "constexpr")
    for i, (name, value) in enumerate(zip(signature, launch.arguments, strict=False)):
        match value:
            case None:
                constants[name] = None
            case int():
                signature[name] = "i32" if value < 2**31 else "i64"
            case Tensor():
                signature[name] = f"*{_TYPES[value.dtype]}"
                # torch allocates at multiples of more than that.
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm


def disassembled(cubin: bytes) -> str:
    """Return machine code as text."""
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [disassembler, "-c", file.name]
        return subprocess.check_output(command, text=True, timeout=60)
