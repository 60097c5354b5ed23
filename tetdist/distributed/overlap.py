"""Gradients averaged over processes while the backward pass still computes those of earlier layers.

The last layers' gradients are there first. As soon as a bucket of them is full it is added to what
the step's earlier backward passes left, and summed over the processes, on a GPU by a stream of
NCCL's beside the one that computes. Each element is the sum of the same numbers as without this.
Of more than two processes the order in which a network adds them depends on an element's place in
its bucket, so whoever wants the same bits takes the same buckets.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tetdist.distributed.buffers import one_buffer_for

# Large enough that a link's bandwidth counts and not its latency, and small enough that little is
# left to average when the first layer's gradient is there: 87 MB of a SEW-ResNet-34 are four.
BUCKET_BYTES = 25 * 2**20


# Gradients that were set aside before a backward pass.
Earlier = dict[nn.Parameter, Tensor]


def join(parameters: Iterable[nn.Parameter], earlier: Earlier) -> None:
    """Add the gradients of a backward pass to what was there before it, which takes their place.

    On a GPU in a few kernels; autograd, which finds a gradient there, takes one for each parameter.

    Args:
        parameters: Those whose gradients are there.
        earlier: What of these is in it is added to, and taken out.
    """
    grads = {p: earlier.pop(p) for p in parameters if p in earlier}
    new = [(grad, p.grad) for p, grad in grads.items() if p.grad is not None]
    if new:
        sums, summands = zip(*new, strict=True)
        torch._foreach_add_(sums, summands)
    for parameter, grad in grads.items():
        parameter.grad = grad


class _Sum(NamedTuple):
    """A bucket's sum under way."""

    grads: list[Tensor]
    flat: Tensor
    parts: list[Tensor]
    work: Any


class OverlappedMean:
    """Averages the gradients of parameters over processes, bucket by bucket, in a backward pass.

    Every process has to compute them in the same order, which it does for the same network.

    Attributes:
        active: Whether gradients that come are final: True in a step's last micro-batch alone.
        earlier: What the step's earlier backward passes left; see `join`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world_size: int) -> None:
        """
        Args:
            parameters: In the order of the forward pass, each of which gets its gradient once in a
                backward pass.
            world_size: Number of processes.
        """
        self.active = False
        self.earlier: Earlier = {}
        self._world_size = world_size
        self._buckets = _buckets([p for p in parameters if p.requires_grad])
        self._bucket_of: dict[Tensor, int] = {
            p: i for i, bucket in enumerate(self._buckets) for p in bucket
        }
        self._missing: list[int] = []
        self._under_way: list[_Sum] = []
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._arrived)
            for parameter in self._bucket_of
        ]
        self._restart()

    def _restart(self) -> None:
        self._missing = [len(bucket) for bucket in self._buckets]
        self._under_way = []

    def _arrived(self, parameter: Tensor) -> None:
        if not self.active:
            return
        self._missing[self._bucket_of[parameter]] -= 1
        # In the order of buckets on every process, whichever is full first.
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
        flat, parts = one_buffer_for(grads)
        torch._foreach_copy_(parts, grads)
        self._under_way.append(_Sum(grads, flat, parts, dist.all_reduce(flat, async_op=True)))

    def finish(self) -> None:
        """Put the averages in the gradients' place; to be called after the last backward pass."""
        # A parameter that had no part in the loss has left its bucket open.
        for bucket in self._buckets[len(self._under_way) :]:
            self._begin(bucket)
        for grads, flat, parts, work in self._under_way:
            if work is not None:
                # On a GPU this has the computing stream wait, and not the host.
                work.wait()
                flat.div_(self._world_size)
                torch._foreach_copy_(grads, parts)
        self._restart()
        self.active = False

    def close(self) -> None:
        """Let go of the parameters."""
        for handle in self._handles:
            handle.remove()


def _buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters from the last to the first, of one type each, in buckets of like size."""
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
