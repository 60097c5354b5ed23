"""What stands in for a GPU's CUDA graph on a CPU: for `graphs.capture`, one of two.

A tape takes down torch's operations and the tensors that they read and write, and repeats these
alone: like a graph it does nothing of what Python does, and finds its numbers where they were when
it was made. Fused kernels, which are no operations of torch's on a CPU, are run again by Python
instead.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tetdist.nn.batch_norm import BatchNorm
from tetdist.training import graphs
from tetdist.training.graphs import Captured


class Tape(TorchDispatchMode):
    """Operations of torch, with the tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        # The memory as it is now, whatever becomes of the tensor that names it.
        held = tree_map_only(Tensor, Tensor.detach, (arguments, options or {}, result))
        self.operations.append((function, *held))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Repeat them on the same memory."""
        for function, arguments, options, result in self.operations:
            again = function(*arguments, **options)
            inputs = {_memory(x) for x in tree_leaves((arguments, options)) if torch.is_tensor(x)}
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if torch.is_tensor(old) and _memory(old) not in inputs:
                    old.copy_(new)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def taped(function: Callable[[], Tensor], *_: Any) -> Captured:
    for _ in range(graphs.WARM_UPS):
        function()
    with Tape() as tape:
        result = function()
    return result, tape.replay


def run_again(function: Callable[[], Tensor], *_: Any) -> Captured:
    for _ in range(graphs.WARM_UPS):
        function()
    result = function()
    recorded = BatchNorm.recorded

    def replay() -> None:
        # What is counted on the host is not counted by a graph.
        BatchNorm.recorded = lambda _: None
        try:
            result.copy_(function())
        finally:
            BatchNorm.recorded = recorded

    return result, replay
