"""Counts what the forward and backward pass of a micro-batch ask of a GPU.

The network itself runs, with its way to recompute, on tensors that have shapes and no numbers
(torch's meta device), so that nothing is computed and no memory is needed. Each operation is noted
with the bytes of its arguments and results, and what convolutions and matrix products multiply; in
place of the kernels of a GPU those of kernels.py are called. Noted, too, is how much memory is in
use at most. All of it is arithmetic about shapes: caches, which would have some bytes read faster,
and what cuDNN needs to work in are not in it.
"""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tetdist.apps.roofline import kernels
from tetdist.errors import UserError
from tetdist.nn import batch_norm
from tetdist.nn.fast import passes
from tetdist.nn.precision import LOW_PRECISION, parameter_type

CONVOLUTIONS = "convolutions"
# What is noted of no other kind: sums of the gradients of two branches, pooling, the head.
OTHERS = kernels.POOLING


@dataclass(frozen=True)
class Kernel:
    """The work of one operation.

    Attributes:
        kind: The part of the table that it belongs to.
        name: Of the operation.
        bytes: That it reads and writes.
        operations: Products and sums of convolutions and matrix products, two a pair.
        launches: Kernels that it starts.
    """

    kind: str
    name: str
    bytes: int
    operations: int = 0
    launches: int = 1


@dataclass(frozen=True)
class Work:
    """The work of a micro-batch, forward and backward.

    Attributes:
        batch: Samples.
        precision: The configuration's.
        kernels: In their order.
        peak_bytes: The most memory that activations, their gradients and those of the weights fill.
    """

    batch: int
    precision: str
    kernels: tuple[Kernel, ...]
    peak_bytes: int


def count(model: nn.Module, shape: tuple[int, ...], precision: str) -> Work:
    """Count the work of a micro-batch, in training.

    Args:
        model: Any; it stays what it is. A network of tetdist recomputes if it was told to.
        shape: Of the input: (B, 3, H, W), or (B, T, 2, H, W) for events.
        precision: The configuration's.

    Raises:
        UserError: The network asks a tensor for its numbers.
    """
    dtype = LOW_PRECISION[precision] or parameter_type(precision)
    shadow = copy.deepcopy(model).to("meta", dtype).train()
    shadow.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub lacks it
    batch_norm.defer_running_statistics(shadow)
    images = torch.empty(shape, dtype=dtype, device="meta")
    if images.ndim == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    counter = _Counter([images, *shadow.parameters(), *shadow.buffers()])
    try:
        with counting(counter):
            shadow(images).float().sum().backward()
    except (NotImplementedError, RuntimeError) as error:  # of torch, whose meta tensors lack it
        raise UserError(
            f"what {type(model).__name__} asks of a GPU cannot be computed, since it needs more of "
            f"a tensor than its shape ({str(error).splitlines()[0]})"
        ) from error
    return Work(shape[0], precision, tuple(counter.kernels), counter.peak_bytes)


@contextmanager
def counting(counter: "_Counter") -> Iterator[None]:
    """Have what is computed in this context noted."""
    before = kernels.note
    kernels.note = counter.note
    try:
        with passes.on_meta(kernels), counter:
            yield
    finally:
        kernels.note = before


class _Counter(TorchDispatchMode):
    """Notes every operation of torch, and what it keeps in memory.

    Args:
        there: Tensors whose memory does not count.
    """

    def __init__(self, there: list[Tensor]) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.peak_bytes = self._bytes = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        arguments: tuple[Any, ...] = (),
        options: dict[str, Any] | None = None,
    ) -> Any:
        result = function(*arguments, **(options or {}))
        if function._schema.name in ("aten::convolution", "aten::convolution_backward"):
            # As cuDNN lays them out where activations and weights are so.
            result = tree_map_only(Tensor, _channels_last, result)
        tensors = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        for tensor in tensors:
            self._hold(tensor)
        if tensors and not _is_free(function):
            self.kernels += _kernels_of(str(function).removeprefix("aten."), arguments, result)
        return result

    def note(self, kind: str, name: str, tensors: tuple[Tensor | None, ...], launches: int) -> None:
        self.kernels.append(Kernel(kind, name, _bytes_of(tensors), launches=launches))

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self._bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        weakref.finalize(storage, self._let_go, storage._cdata, storage.nbytes())

    def _let_go(self, pointer: int, num_bytes: int) -> None:
        self._known.discard(pointer)
        self._bytes -= num_bytes


def _channels_last(x: Tensor) -> Tensor:
    if x.ndim != 4:
        return x
    return torch.empty_like(x, memory_format=torch.channels_last)


# They write nothing, though their schema does not call their results views.
_FREE = ("_unsafe_view", "detach", "empty", "new_empty", "lift_fresh", "promote_types")


def _is_free(function: Any) -> bool:
    name = function._schema.name.removeprefix("aten::")
    if name.startswith(_FREE):
        return True
    aliases = [one.alias_info for one in function._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _kernels_of(name: str, arguments: tuple[Any, ...], result: Any) -> list[Kernel]:
    read = [x for x in tree_leaves(arguments) if isinstance(x, Tensor)]
    written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    moved = _bytes_of((*read, *written))
    match name.split(".")[0]:
        case "convolution":
            operations = 2 * result.numel() * arguments[1][0].numel()
            return [Kernel(CONVOLUTIONS, "convolution", moved, operations)]
        case "convolution_backward":
            grad, x, weight = arguments[:3]
            operations = 2 * grad.numel() * weight[0].numel()
            of_x, of_weight, _ = result
            found = []
            if of_x is not None:
                moved = _bytes_of((grad, weight, of_x))
                found.append(Kernel(CONVOLUTIONS, "gradient of the input", moved, operations))
            if of_weight is not None:
                moved = _bytes_of((grad, x, of_weight))
                found.append(Kernel(CONVOLUTIONS, "gradient of the weight", moved, operations))
            return found
        case "mm" | "addmm" | "bmm":
            inner = read[-2].shape[-1]
            return [Kernel(OTHERS, name, moved, 2 * result.numel() * inner)]
        case "_to_copy" if read[0].dtype == torch.uint8:
            return [Kernel(kernels.UNPACKING, name, moved)]
        case _:
            return [Kernel(OTHERS, name, moved)]


def _bytes_of(tensors: tuple[Tensor | None, ...]) -> int:
    """Bytes of tensors; of one that is expanded only those that are there."""
    return sum(
        min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
        for x in tensors
        if x is not None
    )
