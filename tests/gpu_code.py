"""The machine code that the Triton kernels become on a GPU, read without a GPU.

The kernels are called with tensors without contents, and each launch is noted instead of done;
Triton compiles what was noted for a GPU of a given kind, and brings assembler and disassembler.
"""

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.fast import triton_kernels
from tetdist.nn.fast.fused import Affine, Averages, Inputs, OutputGradients
from tetdist.nn.fast.pooling import Pooled
from tetdist.nn.neurons import LIF, NeuronConfig

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


@dataclass(frozen=True, kw_only=True)
class Part:
    """Part of a network in training; the defaults are of SEW-ResNet-34's first stage."""

    dtype: torch.dtype = torch.bfloat16
    timesteps: int = 4
    rows: int = 32 * 56 * 56
    channels: int = 64
    neuron: NeuronConfig = field(default_factory=LIF)

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def learned(self) -> tuple[Tensor, ...]:
        """Return the neurons' learnt values for the kernels."""
        values = self.neuron.parameters(self.channels).items()
        parameters = {name: value.to("meta", self.wide) for name, value in values}
        return self.neuron.for_kernels(self.timesteps, **parameters)


@dataclass(frozen=True, kw_only=True)
class Layer(Part):
    """A layer of neurons behind a norm."""

    shortcut: Literal["none", "plain", "normalized"] = "none"
    identity: bool = False
    carries: bool = False

    def launches(self) -> list[Launch]:
        """Return its kernel launches: the forward pass, then the backward pass."""

        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        one_step = (self.rows, self.channels)
        all_steps = (self.timesteps, *one_step)
        norm = BatchNorm(self.channels).to("meta", self.wide)
        kernels = triton_kernels.NeuronKernels(
            self.neuron, self.timesteps, carries=self.carries, packs=True
        )
        with noted() as launches:
            x = empty(*all_steps)
            starts = kernels.dynamics.carried
            start = empty(starts, *one_step, dtype=self.wide) if self.carries else None
            affine = kernels.normalization(norm, x)
            shortcut = of_shortcut = None
            if self.shortcut != "none":
                shortcut = empty(*all_steps)
            if self.shortcut == "normalized":
                assert shortcut is not None
                of_shortcut = kernels.normalization(norm, shortcut)
            inputs = Inputs(x, shortcut, affine, of_shortcut, start, self.learned())
            kernels.spikes(inputs, empty(*all_steps) if self.identity else None)
            grads = OutputGradients(empty(*all_steps), start)
            sums, _ = kernels.sums(inputs, grads)
            own, other_hat = (sums.grad, sums.grad_xhat), sums.grad_shortcut_hat
            of_other = None if other_hat is None else (sums.grad, other_hat)
            kernels.gradients(inputs, grads, None, Averages(own, of_other), needs_x=True)
        return launches


@dataclass(frozen=True, kw_only=True)
class Stream(Part):
    """A norm, a shortcut that is added, and neurons without a norm: of membrane shortcuts."""

    normalized: bool = False

    def launches(self) -> list[Launch]:
        """Return its kernel launches without statistics: forward, then backward."""
        shape = (self.rows, self.channels)
        x = torch.empty(self.timesteps, *shape, dtype=self.dtype, device="meta")
        affine = Affine(*torch.empty(4, self.channels, dtype=self.wide, device="meta"))
        of_shortcut = affine if self.normalized else None
        norm = triton_kernels.NormKernels(self.timesteps)
        kernels = triton_kernels.NeuronKernels(
            self.neuron, self.timesteps, carries=False, packs=True
        )
        with noted() as launches:
            stream = Inputs(x, x, affine, of_shortcut)
            norm.add(stream)
            inputs = Inputs(x, learned=self.learned())
            kernels.spikes(inputs, None)
            kernels.current_gradient(inputs, OutputGradients(x, None))
            sums = norm.add_sums(stream, x)
            norm.norm_gradient(x, x, affine, (sums.grad, sums.grad_xhat))
        return launches


@dataclass(frozen=True, kw_only=True)
class Attention(Part):
    """Attention and the neurons behind it; the defaults are of QKFormer's last stage."""

    channels: int = 64  # of a head, in queries and keys
    values: int = 64
    positions: int = 14 * 14
    images: int = 32
    carries: bool = False

    def launches(self) -> list[Launch]:
        """Return its kernel launches: the forward pass, then the backward pass."""
        q, v = (
            torch.empty(self.timesteps, self.images, 6 * one, 1, self.positions, device="meta")
            for one in (self.channels, self.values)
        )
        options = {"carries": self.carries, "packs": True}
        q = q.to(self.dtype)
        kernels = triton_kernels.AttentionKernels(self.neuron, q, v, 6, 0.125, **options)
        assert kernels.serve()
        q, v = (x.flatten(1, 3).to(torch.uint8) for x in (q, v))
        start = torch.empty_like(v[0], dtype=self.wide) if self.carries else None
        inputs = Inputs((q, q, v), start=start, learned=self.learned())
        with noted() as launches:
            spikes, _, _ = kernels.spikes(inputs, None)
            kernels.current_gradient(inputs, OutputGradients(spikes, start))
        return launches


def pooling(images: int = 128) -> list[Launch]:
    """Return the launches of max-pooling: behind a ResNet's stem, of a transformer's current."""
    kernels = triton_kernels.Pool()
    window = torch.nn.MaxPool2d(3, 2, 1)
    spikes = torch.empty(images, 112, 112, 64, dtype=torch.uint8, device="meta")
    spikes = spikes.permute(0, 3, 1, 2)
    affine = Affine(*torch.empty(4, 64, device="meta"))
    with noted() as launches:
        kernels.forward_normalized(spikes.to(torch.bfloat16), affine, window)
        pooled, _, where = kernels.forward(spikes, 1, torch.bfloat16, window)
        kernels.backward(pooled, where, spikes.shape, window)
        current = Pooled(spikes.to(torch.bfloat16), affine, where, window)
        norm = triton_kernels.NormKernels(1)
        sums, grad = kernels.sums(norm, current, pooled)
        kernels.gradient(norm, current, grad, sums[:2])
    return launches


def packing(images: int = 128) -> list[Launch]:
    """Return the launches that unpack bytes, pack numbers, and unpack halves of bytes."""
    values = torch.empty(images, 56, 56, 64, dtype=torch.uint8, device="meta")
    with noted() as launches:
        triton_kernels.unpack(values, 4, torch.bfloat16)
        halves = triton_kernels.halve(values)
        triton_kernels.unpack_halves(halves, values.shape, values.stride(), 1, torch.bfloat16)
    return launches


def compiled(launch: Launch, capability: int) -> tuple[str, str]:
    """Compile a kernel as it would be for this launch, for a GPU of a kind (80, 90).

    Returns:
        Triton's own code of it, and its disassembled machine code.
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
    target = GPUTarget("cuda", capability, 32)
    kernel = triton.compile(source, target=target, options=options)
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [disassembler, "-c", file.name]
        return kernel.asm["ttir"], subprocess.check_output(command, text=True, timeout=60)
