"""Gradients averaged over processes while the backward pass still computes those of earlier layers.

The last layers' gradients are ready first. A full bucket of them is added to the gradients of the
step's earlier backward passes and summed over the processes, on a GPU by an NCCL stream beside the
computing one. Each element is the sum of the same numbers as without overlap. With more than two
processes the network's order of addition depends on an element's place in its bucket, so bitwise
identical results need the same buckets.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tetdist.buffers import in_one_buffer

# Large enough for a link's bandwidth to matter rather than its latency, and small enough that
# little is left to average after the first layer's gradient: 87 MB of a SEW-ResNet-34 make four.
BUCKET_BYTES = 25 * 2**20


# Gradients that were set aside before a backward pass.
Earlier = dict[nn.Parameter, Tensor]


def join(parameters: Iterable[nn.Parameter], earlier: Earlier) -> None:
    """Add the gradients of a backward pass to earlier ones; the sums replace the gradients.

    On a GPU this takes a few kernels; autograd's accumulation takes one per parameter.

    Args:
        earlier: Earlier gradients; those of ``parameters`` are removed.
    """
    grads = {p: earlier.pop(p) for p in parameters if p in earlier}
    new = [(grad, p.grad) for p, grad in grads.items() if p.grad is not None]
    if new:
        sums, summands = zip(*new, strict=True)
        torch._foreach_add_(sums, summands)
    for parameter, grad in grads.items():
        parameter.grad = grad


class _Sum(NamedTuple):
    """A bucket whose sum is being computed."""

    grads: list[Tensor]
    flat: Tensor
    parts: list[Tensor]
    work: Any


class OverlappedMean:
    """Averages the gradients of parameters over processes, bucket by bucket, in a backward pass.

    Every process must compute them in the same order; processes with the same network do.

    Attributes:
        active: True if arriving gradients are final: in a step's last micro-batch only.
        earlier: Gradients of the step's earlier backward passes; see `join`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world_size: int) -> None:
        """
        Args:
            parameters: Parameters in the order of the forward pass; each gets its gradient once in
                a backward pass.
        """
        self.active = False
        self.earlier: Earlier = {}
        self._world_size = world_size
        self._buckets = _buckets([p for p in parameters if p.requires_grad])
        self._bucket_of: dict[Tensor, int] = {
            p: i for i, bucket in enumerate(self._buckets) for p in bucket
        }
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._arrived)
            for parameter in self._bucket_of
        ]
        self._restart()

    def _restart(self) -> None:
        self._missing = [len(bucket) for bucket in self._buckets]
        self._under_way: list[_Sum] = []

    def _arrived(self, parameter: Tensor) -> None:
        if not self.active:
            return
        self._missing[self._bucket_of[parameter]] -= 1
        # Sum buckets in the same order on every process, whichever is full first.
        while (next_one := len(self._under_way)) < len(self._buckets):
            if self._missing[next_one] > 0:
                return
            self._begin(self._buckets[next_one])

    def _begin(self, bucket: list[nn.Parameter]) -> None:
        join(bucket, self.earlier)
        grads = [parameter.grad for parameter in bucket if parameter.grad is not None]
        if not grads:
            self._under_way.append(_Sum([], torch.empty(0), [], None))
            return
        flat, parts = in_one_buffer(grads)
        self._under_way.append(_Sum(grads, flat, parts, dist.all_reduce(flat, async_op=True)))

    def finish(self) -> None:
        """Replace the gradients by their averages; call it after the last backward pass."""
        # A parameter that does not contribute to the loss has left its bucket open.
        for bucket in self._buckets[len(self._under_way) :]:
            self._begin(bucket)
        for grads, flat, parts, work in self._under_way:
            if work is not None:
                # On a GPU this makes the computing stream wait, not the host.
                work.wait()
                flat.div_(self._world_size)
                torch._foreach_copy_(grads, parts)
        self._restart()
        self.active = False

    def close(self) -> None:
        """Remove the hooks from the parameters."""
        for handle in self._handles:
            handle.remove()


def _buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Divide parameters, from last to first, into buckets of one type and similar size each."""
    buckets: list[list[nn.Parameter]] = []
    size = 0
    for parameter in reversed(parameters):
        same_type = buckets and buckets[-1][0].dtype == parameter.dtype
        if not same_type or size >= BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel() * parameter.element_size()
    return buckets
