"""Activation checkpointing: recompute a block in the backward pass instead of keeping activations.

Each block keeps only its input, and that packed: spikes, and the small sums of spikes that blocks
exchange, are whole numbers (or quarters) that half a byte holds exactly. The repeated forward pass
is bitwise identical, so gradients are those of the ordinary backward pass.

A block may also run over segments of timesteps, one after another, with membranes carried from each
to the next. The backward pass then holds the activations of one segment of one block at a time, and
only the packed input grows with T.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tetdist.nn import batch_norm, dropout
from tetdist.nn.norm_neuron import NeuronLayer, carrying_membranes
from tetdist.nn.packed import Halved, Packed, halve, pack, packed_of, with_packed


class Block:
    """A part of a network as a function of (T, B, C, H, W), or of one input for all T.

    Args:
        forward: Function of an input and its number of timesteps. It must be causal: its output at
            t depends only on inputs up to t.
        modules: Modules that it runs, each once.
        segment: Length of a segment in timesteps; None: no segments.
        levels: Inputs are multiples of ``1 / levels``; None: any numbers.
        highest: Largest input in that case; below ``256 / levels``.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, int], Tensor],
        *modules: nn.Module,
        timesteps: int,
        segment: int | None,
        levels: int | None,
        highest: int = 1,
    ) -> None:
        self.forward, self.levels = forward, levels
        self.halves = levels is not None and levels * highest < 16
        self.lengths = [timesteps]
        if segment is not None:
            self.lengths = [min(segment, timesteps - t) for t in range(0, timesteps, segment)]
        self.neurons = [m for top in modules for m in top.modules() if isinstance(m, NeuronLayer)]
        self.dropping = [layer for top in modules for layer in dropout.dropping(top)]
        self.parameters = [p for top in modules for p in top.parameters() if p.requires_grad]

    def split(self, x: Tensor) -> list[Tensor]:
        """Return each segment's input, or the input itself if it is one for all timesteps."""
        if x.shape[0] == 1 or len(self.lengths) == 1:
            return [x] * len(self.lengths)
        parts = list(x.split(self.lengths))
        if packed := packed_of(x):
            values = packed.values.split(self.lengths)
            for part, own in zip(parts, values, strict=True):
                with_packed(part, packed._replace(values=own))
        return parts

    def run(
        self, x: Tensor, timesteps: int, membranes: list[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return one segment's output, and the membranes that the next one starts from."""
        if len(self.lengths) == 1:
            return self.forward(x, timesteps), []
        with carrying_membranes(self.neurons, membranes) as ends:
            return self.forward(x, timesteps), ends()

    def run_all(self, x: Tensor) -> Tensor:
        """Return the output over all segments."""
        outputs, membranes = [], None
        for part, length in zip(self.split(x), self.lengths, strict=True):
            output, membranes = self.run(part, length, membranes)
            outputs.append(output)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def recomputed(self, x: Tensor) -> Tensor:
        """Run all segments, keeping only the packed input for the backward pass."""
        return _Recomputed.apply(x, self, *self.parameters)

    def pack(self, x: Tensor) -> "Kept":
        """Return the kept form of an input."""
        if self.levels is None:
            return x
        packed = packed_of(x) or pack(x.detach(), self.levels)
        assert packed.levels == self.levels
        return halve(packed) if self.halves else packed


class _Recomputed(torch.autograd.Function):
    """A recomputed block. Its parameters are inputs, so that their gradients appear in the usual
    way for code that waits for them there (DeepSpeed)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Block, *_parameters: Tensor) -> Tensor:
        ctx.block, ctx.dtype = block, x.dtype
        ctx.factors = [layer.factors for layer in block.dropping]
        ctx.autocast = _present_autocast(x.device.type)
        kept = block.pack(x)
        # Autograd keeps the tensor and frees it with the graph.
        ctx.save_for_backward(kept if isinstance(kept, Tensor) else kept.values)
        ctx.form = None if isinstance(kept, Tensor) else kept._replace(values=x.new_empty(0))
        return block.run_all(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        block: Block = ctx.block
        (x,) = ctx.saved_tensors
        if ctx.form is not None:
            x = ctx.form._replace(values=x).numbers(ctx.dtype)
        segments = list(zip(block.split(x), block.lengths, strict=True))
        dropped = dropout.using(block.dropping, ctx.factors)
        with batch_norm.recomputing(), dropped:
            starts: list[list[Tensor] | None] = [None]
            with torch.no_grad(), ctx.autocast():
                for part, length in segments[:-1]:
                    starts.append(block.run(part, length, starts[-1])[1])
            grads_x: list[Tensor] = []
            grad_parameters: list[Tensor | None] = [None] * len(block.parameters)
            grad_ends: list[Tensor] = []
            # Layers without neurons may return (1, ...) for all timesteps, without segments.
            grads = (grad_outputs[0],)
            if len(segments) > 1:
                grads = grad_outputs[0].split(block.lengths)
            for (part, length), start, grad in reversed(
                list(zip(segments, starts, grads, strict=True))
            ):
                grad_part, grad_ends, grad_own = _segment_gradients(
                    ctx, part, length, start, grad, grad_ends
                )
                if grad_part is not None:
                    grads_x.insert(0, grad_part)
                grad_parameters = [
                    b if a is None else a + b
                    for a, b in zip(grad_parameters, grad_own, strict=True)
                ]
        return _joined(grads_x, one_for_all=x.shape[0] == 1), None, *grad_parameters


Kept = Tensor | Packed | Halved


def _joined(grads: list[Tensor], *, one_for_all: bool) -> Tensor | None:
    if len(grads) < 2:
        return grads[0] if grads else None
    return torch.stack(grads).sum(0) if one_for_all else torch.cat(grads)


def _segment_gradients(
    ctx: Any,
    x: Tensor,
    timesteps: int,
    start: list[Tensor] | None,
    grad_output: Tensor,
    grad_ends: list[Tensor],
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Run one segment again; return gradients of its input, initial membranes and parameters.

    The backward pass runs in its own autocast mode, as for any other layer.
    """
    block: Block = ctx.block
    needs_input_grad: bool = ctx.needs_input_grad[0]
    with torch.enable_grad(), ctx.autocast():
        packed = packed_of(x)
        x = x.detach().requires_grad_(needs_input_grad)
        if packed:
            with_packed(x, packed)
        start = start and [membrane.detach().requires_grad_() for membrane in start]
        output, ends = block.run(x, timesteps, start)
    inputs = [x] if needs_input_grad else []
    inputs += start or []
    outputs = list(
        zip([output, *ends] if grad_ends else [output], [grad_output, *grad_ends], strict=True)
    )
    # Layers without a membrane, such as ReLU, neither read nor return one.
    ran, grads = zip(*(pair for pair in outputs if pair[0].requires_grad), strict=True)
    gradients = list(
        torch.autograd.grad(ran, [*inputs, *block.parameters], grads, materialize_grads=True)
    )
    grad_x = gradients.pop(0) if needs_input_grad else None
    grad_start = [gradients.pop(0) for _ in start or []]
    return grad_x, grad_start, gradients


def _present_autocast(device_type: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Return a function that re-enters the present autocast mode later."""
    if device_type == "meta":  # there it has none
        return contextlib.nullcontext
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled)
