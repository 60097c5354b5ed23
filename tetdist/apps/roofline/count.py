"""Count the work of a micro-batch's forward and backward pass on a GPU.

The network itself runs, including its recomputation, on tensors with shapes but without values
(torch's meta device), so nothing is computed and no memory is needed. For each operation of torch
it records the bytes of arguments and results, and the products of convolutions and matrix products;
Triton's kernels are recorded instead of launched. It also records the peak memory. All of this is
arithmetic on shapes: it ignores caches, which speed up some reads, and cuDNN's workspace.
"""

import copy
import importlib.util
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tetdist.errors import UserError
from tetdist.nn import batch_norm
from tetdist.nn.fast import dispatch
from tetdist.nn.precision import LOW_PRECISION, parameter_type

CONVOLUTIONS, UNPACKING, POOLING = "convolutions", "unpacking", "pooling and sums"
# Kinds by the files of Triton's kernels. Most of torch's operations count as POOLING: sums of the
# gradients of two branches, pooling, the head.
KINDS = {"neuron": "norm and neuron", "packing": UNPACKING, "pool": POOLING, "attention": POOLING}
# Operations that write nothing, although their schema does not declare views.
FREE = ("_unsafe_view", "detach", "empty", "new_empty", "lift_fresh", "promote_types")


@dataclass(frozen=True)
class Kernel:
    """Work of one operation.

    Attributes:
        kind: Its group in the table.
        bytes: Number of bytes that it reads and writes.
        operations: Number of products and sums of convolutions and matrix products.
        programs: Number of programs of a Triton kernel; None: enough for any GPU.
    """

    kind: str
    name: str
    bytes: int
    operations: int = 0
    programs: int | None = None


@dataclass(frozen=True)
class Work:
    """Work of a micro-batch, forward and backward.

    Attributes:
        peak_bytes: Peak memory of activations, their gradients and the weights' gradients.
    """

    batch: int
    precision: str
    kernels: tuple[Kernel, ...]
    peak_bytes: int


def count(model: nn.Module, shape: tuple[int, ...], precision: str) -> Work:
    """Count the work of a micro-batch, in training.

    Args:
        model: The network, which is not changed; its setting for recomputation applies.
        shape: Shape of the input: (B, 3, H, W), or (B, T, 2, H, W) for events.

    Raises:
        UserError: The network reads a tensor's values, or Triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise UserError(
            "counting a network's kernels needs Triton, which comes with torch for CUDA; pip "
            "install 'triton==3.9.0'"
        )
    dtype = LOW_PRECISION[precision] or parameter_type(precision)
    shadow = copy.deepcopy(model).to("meta", dtype).train()
    shadow.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub lacks it
    batch_norm.defer_running_statistics(shadow)
    images = _channels_last(torch.empty(shape, dtype=dtype, device="meta"))
    counter = _Counter([images, *shadow.parameters(), *shadow.buffers()])
    try:
        with dispatch.on_meta(counter.launch), counter:
            shadow(images).float().sum().backward()
    except (NotImplementedError, RuntimeError) as error:  # meta tensors do not support it
        raise UserError(
            f"the work of {type(model).__name__} cannot be counted, because it reads values of "
            f"tensors, not only shapes ({str(error).splitlines()[0]})"
        ) from error
    return Work(shape[0], precision, tuple(counter.kernels), counter.peak_bytes)


class _Counter(TorchDispatchMode):
    """Recorder of every operation of torch, and of the memory in use.

    Args:
        there: Tensors whose memory does not count.
    """

    def __init__(self, there: list[Tensor]) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.peak_bytes = self._bytes = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        schema = function._schema
        name = schema.name.removeprefix("aten::")
        if name in ("convolution", "convolution_backward"):
            # cuDNN's layout, if activations and weights have it.
            result = tree_map_only(Tensor, _channels_last, result)
        tensors = _tensors_in(result)
        for tensor in tensors:
            self._hold(tensor)
        if tensors and not (name.startswith(FREE) or _are_views(schema.returns)):
            self.kernels += _kernels_of(name, arguments, result)
        return result

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: Sequence[Any],
        _known: Any,
        operations: int = 0,
    ) -> None:
        """Record a kernel of Triton, which reads or writes each of its tensors once."""
        file, name = kernel.fn.__module__.rpartition(".")[2], kernel.fn.__name__
        moved = _bytes_of(_tensors_in(arguments))
        programs = math.prod(grid)
        self.kernels.append(Kernel(KINDS[file], f"{file}.{name}", moved, operations, programs))

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
    return x if x.ndim != 4 else torch.empty_like(x, memory_format=torch.channels_last)


def _are_views(results: Any) -> bool:
    aliases = [one.alias_info for one in results]
    return bool(aliases) and all(one is not None and not one.is_write for one in aliases)


def _kernels_of(name: str, arguments: tuple[Any, ...], result: Any) -> list[Kernel]:
    read = _tensors_in(arguments)
    moved = _bytes_of([*read, *_tensors_in(result)])
    match name:
        case "convolution":
            operations = 2 * result.numel() * arguments[1][0].numel()
            return [Kernel(CONVOLUTIONS, name, moved, operations)]
        case "convolution_backward":
            grad, x, weight = arguments[:3]
            operations = 2 * grad.numel() * weight[0].numel()
            of_x, of_weight, _ = result
            return [
                Kernel(CONVOLUTIONS, name, _bytes_of([grad, other, made]), operations)
                for other, made in ((weight, of_x), (x, of_weight))
                if made is not None
            ]
        case "mm" | "addmm" | "bmm":
            return [Kernel(POOLING, name, moved, 2 * result.numel() * read[-2].shape[-1])]
        case _:
            unpacks = name == "_to_copy" and read[0].dtype == torch.uint8
            return [Kernel(UNPACKING if unpacks else POOLING, name, moved)]


def _tensors_in(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _bytes_of(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of tensors; for an expanded one, those that are stored."""
    return sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)
