"""Activation checkpointing: run a block again in the backward pass instead of keeping what it made.

Of each block only the input is kept, and that packed: spikes, and the small sums of spikes that
blocks exchange, are whole numbers (or halves, or quarters) that a byte holds exactly. The repeated
forward computes the same to the bit, so gradients are those of the ordinary backward pass.

A block may also be run over segments of its timesteps, one after another, with the membranes
carried from each to the next. The backward pass then holds the activations of one segment of one
block at a time: what grows with T is the packed input alone.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tetdist import normalization
from tetdist.fused import NormNeuron, carrying_membranes


class Block:
    """A part of a network as a function of (T, B, C, H, W).

    Args:
        forward: The function; a causal one, that is, its output at t depends on inputs up to t.
        modules: Those that it runs, each once.
        segment: Length of a segment in timesteps; None: all at once.
        levels: Inputs are multiples of ``1 / levels`` and below ``256 / levels``; None: anything.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        *modules: nn.Module,
        segment: int | None,
        levels: int | None,
    ) -> None:
        self.forward, self.segment, self.levels = forward, segment, levels
        self.neurons = [m for top in modules for m in top.modules() if isinstance(m, NormNeuron)]
        self.parameters = [p for top in modules for p in top.parameters() if p.requires_grad]

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x,) if self.segment is None else x.split(self.segment)

    def run(self, x: Tensor, membranes: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """Output of one segment, and the membranes that the next one starts from."""
        if self.segment is None:
            return self.forward(x), []
        with carrying_membranes(self.neurons, membranes) as ends:
            return self.forward(x), ends()

    def run_all(self, x: Tensor) -> Tensor:
        """The output over all segments."""
        outputs, membranes = [], None
        for part in self.split(x):
            output, membranes = self.run(part, membranes)
            outputs.append(output)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def recomputed(self, x: Tensor) -> Tensor:
        """`run_all`, keeping only the packed input for the backward pass."""
        return _Recomputed.apply(x, self, *self.parameters)

    def pack(self, x: Tensor) -> Tensor:
        if self.levels is None:
            return x
        return (x if self.levels == 1 else x * self.levels).to(torch.uint8)

    def unpack(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        if self.levels is None:
            return packed
        x = packed.to(dtype)
        return x if self.levels == 1 else x / self.levels


class _Recomputed(torch.autograd.Function):
    """The parameters are inputs so that their gradients come out where any other's do, and whoever
    waits for them there (DeepSpeed) sees nothing unusual."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Block, *_parameters: Tensor) -> Tensor:
        ctx.block, ctx.dtype = block, x.dtype
        ctx.autocast = _present_autocast(x.device.type)
        ctx.save_for_backward(block.pack(x))
        return block.run_all(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        block: Block = ctx.block
        (packed,) = ctx.saved_tensors
        parts = block.split(block.unpack(packed, ctx.dtype))
        with normalization.recomputing(), ctx.autocast():
            starts: list[list[Tensor] | None] = [None]
            with torch.no_grad():
                for part in parts[:-1]:
                    starts.append(block.run(part, starts[-1])[1])
            grad_input: list[Tensor] = []
            grad_parameters: list[Tensor | None] = [None] * len(block.parameters)
            grad_ends: list[Tensor] = []
            for part, start, grad in reversed(
                list(zip(parts, starts, block.split(grad_outputs[0]), strict=True))
            ):
                gradients = _segment_gradients(
                    block, part, start, grad, grad_ends, ctx.needs_input_grad[0]
                )
                grad_part, grad_ends, grad_own = gradients
                if grad_part is not None:
                    grad_input.insert(0, grad_part)
                grad_parameters = [
                    b if a is None else a + b
                    for a, b in zip(grad_parameters, grad_own, strict=True)
                ]
        grad_x = torch.cat(grad_input) if len(grad_input) > 1 else next(iter(grad_input), None)
        return grad_x, None, *grad_parameters


def _segment_gradients(
    block: Block,
    x: Tensor,
    start: list[Tensor] | None,
    grad_output: Tensor,
    grad_ends: list[Tensor],
    needs_input_grad: bool,
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Run one segment again, and back: gradients of its input, its first membranes, parameters."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(needs_input_grad)
        start = start and [membrane.detach().requires_grad_() for membrane in start]
        output, ends = block.run(x, start)
    inputs = [x] if needs_input_grad else []
    inputs += start or []
    outputs = [output, *ends] if grad_ends else [output]
    gradients = list(
        torch.autograd.grad(outputs, [*inputs, *block.parameters], [grad_output, *grad_ends])
    )
    grad_x = gradients.pop(0) if needs_input_grad else None
    grad_start = [gradients.pop(0) for _ in start or []]
    return grad_x, grad_start, gradients


def _present_autocast(device_type: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Enters, later and elsewhere, the autocast mode that is active now."""
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled)
