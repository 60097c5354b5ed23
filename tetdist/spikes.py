"""Tensors of spikes, kept for the backward pass in a byte each.

Convolutions want spikes as floating-point numbers, and autograd would keep them so. But spikes, the
small sums of them that SEW blocks exchange and their means over 2x2 pixels are whole multiples of 1
or 1/4: a byte holds each exactly. A tensor that is known to be of that kind carries its packed form
along as an attribute; the operations here keep that and let go of the tensor itself. Without the
attribute they are torch's own.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Packed(NamedTuple):
    """A tensor's values in bytes.

    Attributes:
        values: uint8, of the tensor's shape and memory layout: the tensor times ``levels``.
        levels: The tensor is a multiple of ``1 / levels``.
    """

    values: Tensor
    levels: int

    def unpack(self, dtype: torch.dtype) -> Tensor:
        x = self.values.to(dtype)
        return x if self.levels == 1 else x / self.levels


def pack(x: Tensor, levels: int = 1) -> Packed:
    """Pack multiples of ``1 / levels`` in [0, 256 / levels)."""
    return Packed((x if levels == 1 else x * levels).to(torch.uint8), levels)


def carry(x: Tensor, packed: Packed) -> Tensor:
    """Note a tensor's packed form on it, for the operations that come next."""
    # With its version: whoever writes into the tensor makes the note invalid.
    x.packed_spikes = (packed, x._version)  # type: ignore[attr-defined]
    return x


def carried(x: Tensor) -> Packed | None:
    """The packed form that a tensor carries, if any."""
    packed, version = getattr(x, "packed_spikes", (None, 0))
    return packed if version == x._version else None


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of each timestep of (T, B, C, H, W)."""
    packed = carried(x)
    if packed is None or not torch.is_grad_enabled():
        return conv(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    y = _Convolution.apply(
        x.flatten(0, 1).to(dtype),
        conv.weight,
        conv.bias,
        packed._replace(values=packed.values.flatten(0, 1)),
        conv,
    )
    return y.unflatten(0, x.shape[:2])


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, packed: Packed, conv: nn.Conv2d
    ) -> Tensor:
        weight = weight.to(x.dtype)
        ctx.save_for_backward(packed.values, weight)
        ctx.levels, ctx.conv = packed.levels, conv
        bias = None if bias is None else bias.to(x.dtype)
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        conv: nn.Conv2d = ctx.conv
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad_outputs[0],
            Packed(values, ctx.levels).unpack(weight.dtype),
            weight,
            None if conv.bias is None else list(conv.bias.shape),
            conv.stride,
            conv.padding,
            conv.dilation,
            False,
            [0, 0],
            conv.groups,
            list(ctx.needs_input_grad[:3]),
        )
        return (
            grad_x,
            None if grad_weight is None else grad_weight.to(conv.weight.dtype),
            None if grad_bias is None else grad_bias.to(conv.weight.dtype),
            None,
            None,
        )


class MaxPool(nn.MaxPool2d):
    """Max-pooling of each timestep of (T, B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        packed = carried(x)
        flat = x.flatten(0, 1)
        if packed is None or not torch.is_grad_enabled():
            return super().forward(flat).unflatten(0, x.shape[:2])
        values = packed.values.flatten(0, 1)
        pooled = _MaxPool.apply(flat, packed._replace(values=values), self)
        y = pooled.unflatten(0, x.shape[:2])
        return carry(y, pack(y.detach(), packed.levels))


class _MaxPool(torch.autograd.Function):
    """Looks for each window's maximum again in the backward pass: torch would keep the input and
    eight bytes an output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed, pool: nn.MaxPool2d) -> Tensor:
        ctx.save_for_backward(packed.values)
        ctx.levels, ctx.pool = packed.levels, pool
        return F.max_pool2d(x, pool.kernel_size, pool.stride, pool.padding)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (values,) = ctx.saved_tensors
        grad = grad_outputs[0]
        x = Packed(values, ctx.levels).unpack(grad.dtype)
        with torch.enable_grad():
            x.requires_grad_()
            y = F.max_pool2d(x, ctx.pool.kernel_size, ctx.pool.stride, ctx.pool.padding)
        (grad_x,) = torch.autograd.grad(y, x, grad)
        return grad_x, None, None


class AvgPool(nn.Module):
    """Mean over 2x2 pixels of each timestep of (T, B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        packed = carried(x)
        y = F.avg_pool2d(x.flatten(0, 1), 2).unflatten(0, x.shape[:2])
        if packed is None or not torch.is_grad_enabled():
            return y
        return carry(y, pack(y.detach(), 4 * packed.levels))
