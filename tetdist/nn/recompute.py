"""Activation checkpointing: recompute a block in the backward pass instead of keeping activations.

Each block keeps only its input, and that packed: spikes, and the small sums of spikes that blocks
exchange, are integers (or quarters) that half a byte holds exactly. The repeated forward pass
is bitwise identical, so gradients are those of the ordinary backward pass.

A block may also run over segments of timesteps, one after another, with membranes carried from each
to the next. The backward pass then holds the activations of one segment of one block at a time, and
only the packed input grows with T.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tetdist.nn import batch_norm, dropout
from tetdist.nn.norm_neuron import NeuronLayer, carrying_membranes
from tetdist.nn.packed import Halved, Packed, halve, is_marked, marked, pack, packed_of, with_packed

_terms: ContextVar[list[Tensor]] = ContextVar("_terms")


@contextlib.contextmanager
def gathering() -> Iterator[list[Tensor]]:
    """Gather what layers `add` in this thread: parts of a loss, of one shape, which are summed.

    A recomputed block adds the sum of its layers' parts, whose gradient reaches the layers.
    """
    terms: list[Tensor] = []
    token = _terms.set(terms)
    try:
        yield terms
    finally:
        _terms.reset(token)


def _total(terms: list[Tensor]) -> Tensor | None:
    return torch.stack(terms).sum(0) if terms else None


def add(term: Tensor) -> None:
    """Add a part of a loss; see `gathering`."""
    _terms.get().append(term)


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
        parts = [marked(part, x) for part in x.split(self.lengths)]
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
        if len(outputs) == 1:
            return outputs[0]
        joined = torch.cat(outputs)
        return marked(joined) if all(map(is_marked, outputs)) else joined

    def recomputed(self, x: Tensor) -> Tensor:
        """Run all segments, keeping only the packed input for the backward pass."""
        y, total = _Recomputed.apply(x, self, *self.parameters)
        if total is not None:
            add(total)
        return y

    def pack(self, x: Tensor) -> "Kept":
        """Return the kept form of an input."""
        if self.levels is None:
            return x
        packed = packed_of(x) or pack(x.detach(), self.levels)
        assert packed.levels == self.levels
        return halve(packed) if self.halves else packed


@dataclass
class _Segment:
    """A segment of a block in the backward pass.

    Attributes:
        x: Its input.
        membranes: Membranes that it starts from; None: at rest.
        grad_output: Gradient of its output.
    """

    x: Tensor
    timesteps: int
    membranes: list[Tensor] | None
    grad_output: Tensor


@dataclass
class _Gradients:
    """Gradients of a segment's input, if needed, first membranes, and the block's parameters."""

    x: Tensor | None
    membranes: list[Tensor]
    parameters: list[Tensor]


class _Recomputed(torch.autograd.Function):
    """A recomputed block. Its parameters are inputs, so that their gradients appear in the usual
    way for code that waits for them there (DeepSpeed)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, block: Block, *_parameters: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        # Both passes must take the same kernels.
        ctx.block, ctx.dtype, ctx.are_spikes = block, x.dtype, is_marked(x)
        ctx.factors = [layer.factors for layer in block.dropping]
        ctx.autocast = _present_autocast(x.device.type)
        kept = block.pack(x)
        # Autograd keeps the tensor and frees it with the graph.
        ctx.save_for_backward(kept if isinstance(kept, Tensor) else kept.values)
        ctx.form = None if isinstance(kept, Tensor) else kept._replace(values=x.new_empty(0))
        with gathering() as terms:
            y = block.run_all(x)
        return y, _total(terms)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        block: Block = ctx.block
        (x,), ctx.grad_total = ctx.saved_tensors, grad_outputs[1]
        if ctx.form is not None:
            x = ctx.form._replace(values=x).numbers(ctx.dtype)
        x = marked(x) if ctx.are_spikes else x
        # Layers without neurons may return (1, ...) for all timesteps, without segments.
        grads = [grad_outputs[0]]
        if len(block.lengths) > 1:
            grads = list(grad_outputs[0].split(block.lengths))
        parts = zip(block.split(x), block.lengths, grads, strict=True)
        segments = [_Segment(part, length, None, grad) for part, length, grad in parts]
        with batch_norm.recomputing(), dropout.using(block.dropping, ctx.factors):
            with torch.no_grad(), ctx.autocast(), gathering():
                for segment, later in itertools.pairwise(segments):
                    later.membranes = block.run(segment.x, segment.timesteps, segment.membranes)[1]
            grads_x: list[Tensor | None] = []
            total: list[Tensor] = []  # of the parameters
            grad_ends: list[Tensor] = []
            for segment in reversed(segments):
                gradients = _segment_gradients(ctx, segment, grad_ends)
                grads_x.append(gradients.x)
                pairs = zip(total, gradients.parameters, strict=True)
                total = [a + b for a, b in pairs] if total else gradients.parameters
                grad_ends = gradients.membranes
        return _joined(grads_x[::-1], one_for_all=x.shape[0] == 1), None, *total


Kept = Tensor | Packed | Halved


def _joined(grads: list[Tensor | None], *, one_for_all: bool) -> Tensor | None:
    """Join the gradients of segments' inputs, which may be one input for all timesteps."""
    needed = [grad for grad in grads if grad is not None]
    if len(needed) < 2:
        return needed[0] if needed else None
    return torch.stack(needed).sum(0) if one_for_all else torch.cat(needed)


def _segment_gradients(ctx: Any, segment: _Segment, grad_ends: list[Tensor]) -> _Gradients:
    """Run a segment again and return its gradients, from those of its output and last membranes.

    The backward pass runs in its own autocast mode, as for any other layer.
    """
    block: Block = ctx.block
    needs_x: bool = ctx.needs_input_grad[0]
    with torch.enable_grad(), ctx.autocast(), gathering() as terms:
        packed = packed_of(segment.x)
        x = marked(segment.x.detach().requires_grad_(needs_x), segment.x)
        if packed:
            with_packed(x, packed)
        starts = [membrane.detach().requires_grad_() for membrane in segment.membranes or []]
        output, ends = block.run(x, segment.timesteps, starts or None)
        total = _total(terms)
    outputs = [(output, segment.grad_output)]
    if grad_ends:
        outputs += zip(ends, grad_ends, strict=True)
    if total is not None:
        outputs.append((total, ctx.grad_total))
    # Layers without a membrane, such as ReLU, neither read nor return one.
    ran, grads = zip(*(pair for pair in outputs if pair[0].requires_grad), strict=True)
    inputs = [x] * needs_x + starts
    gradients = torch.autograd.grad(
        ran, [*inputs, *block.parameters], grads, materialize_grads=True
    )
    own, of_parameters = gradients[: len(inputs)], gradients[len(inputs) :]
    return _Gradients(own[0] if needs_x else None, list(own[needs_x:]), list(of_parameters))


def _present_autocast(device_type: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Return a function that re-enters the present autocast mode later."""
    if device_type == "meta":  # there it has none
        return contextlib.nullcontext
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled)
