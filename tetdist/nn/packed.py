"""Spike tensors, kept for the backward pass with one byte per value.

Convolutions need spikes as floating-point numbers, and autograd would keep them so. But spikes, the
small sums of them that SEW blocks exchange, and their means over 2x2 pixels are multiples of 1 or
1/4, which a byte holds exactly. `with_packed` attaches a tensor's packed form to it as an
attribute: layers pass plain tensors, so that any module of torch may stand between them. The
operations here keep the packed form and free the tensor itself; for a tensor without one they are
torch's own.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tetdist.nn.fast import dispatch, native_zeros
from tetdist.nn.fast.native_zeros import Layer
from tetdist.nn.fast.pooling import Pooling


class Packed(NamedTuple):
    """A tensor's values in bytes.

    Attributes:
        values: The tensor times ``levels``, uint8, in the tensor's shape and memory layout.
        levels: The tensor is a multiple of ``1 / levels``.
    """

    values: Tensor
    levels: int

    def unpack(self, dtype: torch.dtype) -> Tensor:
        if self.levels == 1:
            return self.values.to(dtype)
        if (gpu := dispatch.triton_for("neurons", self.values)) is not None:
            return gpu.unpack(self.values, self.levels, dtype)
        return self.values.to(dtype) / self.levels

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """Return the tensor, with its packed form attached."""
        return with_packed(self.unpack(dtype), self)


def pack(x: Tensor, levels: int = 1) -> Packed:
    """Pack multiples of ``1 / levels`` in [0, 256 / levels)."""
    return Packed((x if levels == 1 else x * levels).to(torch.uint8), levels)


class Halved(NamedTuple):
    """Bytes below 16, packed two in one, in memory order.

    Attributes:
        values: uint8, flat.
        levels: See `Packed`.
        shape: Shape of the unpacked bytes.
        strides: Their strides, kept since a convolution rounds differently in another layout.
    """

    values: Tensor
    levels: int
    shape: torch.Size
    strides: tuple[int, ...]

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """Return the tensor, with its packed form attached."""
        if (gpu := dispatch.triton_for("neurons", self.values)) is not None:
            of = (self.values, self.shape, self.strides, self.levels)
            values, numbers = gpu.unpack_halves(*of, dtype)
            return with_packed(numbers, Packed(values, self.levels))
        flat = torch.stack([self.values & 15, self.values >> 4], dim=1).flatten()
        return Packed(flat.as_strided(self.shape, self.strides), self.levels).numbers(dtype)


def halve(packed: Packed) -> Halved:
    """Pack bytes below 16 of a dense tensor."""
    values, levels = packed
    if (gpu := dispatch.triton_for("neurons", values)) is not None:
        return Halved(gpu.halve(values), levels, values.shape, values.stride())
    flat = values.as_strided((values.numel(),), (1,), values.storage_offset())
    if flat.numel() % 2:
        flat = F.pad(flat, (0, 1))
    low, high = flat.view(-1, 2).unbind(1)
    return Halved(low | (high << 4), levels, values.shape, values.stride())


def with_packed(x: Tensor, packed: Packed) -> Tensor:
    """Attach a tensor's packed form to it, which holds until the tensor is written to."""
    x.packed_spikes = (packed, _version(x))  # type: ignore[attr-defined]  # ours
    return x


def packed_of(x: Tensor) -> Packed | None:
    """Return a tensor's packed form, if it has one and was not written to since."""
    packed, version = getattr(x, "packed_spikes", (None, 0))
    return packed if version == _version(x) else None


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a tensor to another type, keeping the packed form of ``x``."""
    packed, y = packed_of(x), marked(x.to(dtype), x)
    return y if packed is None else with_packed(y, packed)


def marked(x: Tensor, like: Tensor | None = None) -> Tensor:
    """Mark spikes of 0 and 1, whose convolution may skip the zeros; given ``like``, if it is so.

    In inference_mode a tensor does not know that it was written to since; a convolution without
    gradients reads the numbers, and skips only if they are still 0 and 1.
    """
    if like is None or is_marked(like):
        x.is_spikes = _version(x)  # type: ignore[attr-defined]  # ours
    return x


def is_marked(x: Tensor) -> bool:
    """Return whether a tensor is marked as spikes of 0 and 1, and was not written to since."""
    return getattr(x, "is_spikes", None) == _version(x)


def _version(x: Tensor) -> int:
    # Tensors of inference_mode have no version counter.
    return 0 if x.is_inference() else x._version


class Conv2d(nn.Conv2d):
    """A convolution of each timestep of (T, B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        packed = packed_of(x)
        flat = x.flatten(0, 1)
        dtype = _compute_type(x)
        if x.device.type == "cpu" and flat.shape[2:] == (1, 1) and dtype.itemsize == 2:
            # torch 2.13 on a CPU leaves the weight gradient of a strided bfloat16 convolution of a
            # single pixel uninitialised.
            bias = None if self.bias is None else self.bias.float()
            with torch.autocast("cpu", enabled=False):
                y = self._conv_forward(flat.float(), self.weight.float(), bias)
            return y.unflatten(0, x.shape[:2]).to(dtype)
        layer = native_zeros.layer_for(self, flat, dtype) if is_marked(x) else None
        if not torch.is_grad_enabled():
            y = native_zeros.convolve(flat.to(dtype), layer, dtype) if layer is not None else None
            return (super().forward(flat) if y is None else y).unflatten(0, x.shape[:2])
        if packed is None and layer is not None:
            packed = pack(x.detach())
        if packed is None:
            return super().forward(flat).unflatten(0, x.shape[:2])
        flat_packed = packed._replace(values=packed.values.flatten(0, 1))
        y = _Convolution.apply(flat.to(dtype), self.weight, self.bias, flat_packed, self, layer)
        return y.unflatten(0, x.shape[:2])


def _compute_type(x: Tensor) -> torch.dtype:
    """Return the type in which a convolution of ``x`` computes now."""
    if x.dtype == torch.float64 or x.device.type == "meta":  # there autocast has no type
        return x.dtype
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        packed: Packed,
        conv: nn.Conv2d,
        layer: Layer | None,
    ) -> Tensor:
        weight = weight.to(x.dtype)
        ctx.save_for_backward(packed.values, weight)
        ctx.levels, ctx.conv, ctx.layer = packed.levels, conv, layer
        if layer is not None:
            y = native_zeros.convolve(packed.values, layer, x.dtype)
            assert y is not None
            return y
        bias = None if bias is None else bias.to(x.dtype)
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        conv: nn.Conv2d = ctx.conv
        (grad,), needed = grad_outputs, ctx.needs_input_grad[:3]
        # In bfloat16 a weight gradient that skips gains nothing.
        skips = ctx.layer is not None and weight.dtype == torch.float32
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad,
            # The input's gradient does not need the input.
            torch.empty_like(values, dtype=weight.dtype)
            if skips
            else Packed(values, ctx.levels).unpack(weight.dtype),
            weight,
            None if conv.bias is None else list(conv.bias.shape),
            conv.stride,
            conv.padding,
            conv.dilation,
            False,
            [0, 0],
            conv.groups,
            [needed[0], needed[1] and not skips, needed[2] and not skips],
        )
        if skips and needed[1]:
            grad_weight = native_zeros.weight_gradient(values, grad, ctx.layer)
        if skips and needed[2]:
            # Asked for the bias's alone, torch would compute the weight's gradient, too.
            grad_bias = grad.sum((0, 2, 3))
        return (
            grad_x,
            None if grad_weight is None else grad_weight.to(conv.weight.dtype),
            None if grad_bias is None else grad_bias.to(conv.weight.dtype),
            *(None, None, None),
        )


class MaxPool(nn.MaxPool2d):
    """Max-pooling of each timestep of (T, B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        packed = packed_of(x)
        flat = x.flatten(0, 1)
        if packed is None or not torch.is_grad_enabled():
            return marked(super().forward(flat).unflatten(0, x.shape[:2]), x)
        kernels = dispatch.pooling_for(flat)
        if kernels is None:
            y = marked(super().forward(flat).unflatten(0, x.shape[:2]), x)
            return with_packed(y, pack(y.detach(), packed.levels))
        flat_packed = packed._replace(values=packed.values.flatten(0, 1))
        y, values = _MaxPool.apply(flat, flat_packed, self, kernels)
        again = packed._replace(values=values.unflatten(0, x.shape[:2]))
        return with_packed(marked(y.unflatten(0, x.shape[:2]), x), again)


class _MaxPool(torch.autograd.Function):
    """Max-pooling that keeps one byte per output: its position in the window."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: Packed, pool: nn.MaxPool2d, kernels: Pooling
    ) -> tuple[Tensor, Tensor]:
        y, values, where = kernels.forward(packed.values, packed.levels, x.dtype, pool)
        ctx.save_for_backward(where)
        ctx.shape, ctx.pool, ctx.kernels = x.shape, pool, kernels
        ctx.mark_non_differentiable(values)
        return y, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (where,) = ctx.saved_tensors
        grad_x = ctx.kernels.backward(grad_outputs[0], where, ctx.shape, ctx.pool)
        return grad_x, None, None, None


class AvgPool(nn.AvgPool2d):
    """Mean over windows, by default of 2x2 pixels, of each timestep of (T, B, C, H, W)."""

    def __init__(self, kernel_size: int = 2, stride: int | None = None, padding: int = 0) -> None:
        super().__init__(kernel_size, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        packed = packed_of(x)
        flat = x.flatten(0, 1)
        if packed is None or not torch.is_grad_enabled():
            return super().forward(flat).unflatten(0, x.shape[:2])
        y = _AvgPool.apply(flat, self).unflatten(0, x.shape[:2])
        # Quarters and their sums are exact in floating point; ninths are not.
        return with_packed(y, pack(y.detach(), 4 * packed.levels)) if self.kernel_size == 2 else y


class _AvgPool(torch.autograd.Function):
    """Averages over windows whose gradient needs only the input's shape; torch would keep the
    input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: nn.AvgPool2d) -> Tensor:
        ctx.shape, ctx.strides, ctx.pool = x.shape, x.stride(), pool
        return F.avg_pool2d(x, pool.kernel_size, pool.stride, pool.padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        grad, pool = grad_outputs[0], ctx.pool
        like = torch.empty_strided(ctx.shape, ctx.strides, dtype=grad.dtype, device=grad.device)
        sides = [[side, side] for side in (pool.kernel_size, pool.stride, pool.padding)]
        grad_x = torch.ops.aten.avg_pool2d_backward(grad, like, *sides, False, True, None)
        return grad_x, None
