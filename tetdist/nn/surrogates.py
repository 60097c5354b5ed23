"""The spike and its surrogate gradients, and the number of spikes, as functions of tensors."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def triangle(x: Tensor, width: float) -> Tensor:
    """Return ``max(0, width - |x|) / width^2`` (TET, equation 5, with the width as gamma)."""
    return (width - x.abs()).clamp(min=0) / width**2


def atan(x: Tensor, alpha: float) -> Tensor:
    """Return ``alpha / (2 (1 + (pi/2 alpha x)^2))`` (SEW-ResNet's surrogate, alpha = 2)."""
    return alpha / 2 / (1 + (math.pi / 2 * alpha * x) ** 2)


def sigmoid(x: Tensor, alpha: float) -> Tensor:
    """Return ``alpha sigma(alpha x) (1 - sigma(alpha x))``: a logistic function's derivative."""
    s = torch.sigmoid(alpha * x)
    return alpha * s * (1 - s)


def rectangle(x: Tensor, width: float) -> Tensor:
    """Return ``1 / (2 width)`` where ``|x| < width``, else 0 (STBP, Wu et al. 2018)."""
    return (x.abs() < width).to(x.dtype) / (2 * width)


# In the order of their numbers in kernels/neuron.cpp.
SURROGATES: dict[str, Callable[[Tensor, float], Tensor]] = {
    function.__name__: function for function in (triangle, atan, sigmoid, rectangle)
}


class Step(torch.autograd.Function):
    """Heaviside step in the forward pass, surrogate in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, surrogate: str, width: float, at_threshold: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.surrogate, ctx.width = surrogate, width
        return (x >= 0 if at_threshold else x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        return grad_outputs[0] * SURROGATES[ctx.surrogate](x, ctx.width), None, None, None


class Count(torch.autograd.Function):
    """``round(clip(x, 0, most))`` in the forward pass, ``clip``'s gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, most: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.most = most
        return x.clamp(0, most).round()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad_outputs[0] * ((x >= 0) & (x <= ctx.most)), None
