"""Batch norm and max-pooling of a current before the neurons, which pools real numbers.

The definition is one line. The fast path keeps only the current and, for each output, a byte with
its position in the window.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.fast import dispatch
from tetdist.nn.fast.fused import Affine, NormKernels, Norms
from tetdist.nn.fast.pooling import Pooled, Pooling
from tetdist.nn.norm_neuron import FusedLayer, image_of, rows_of
from tetdist.nn.packed import MaxPool


class NormPool(FusedLayer):
    """Batch norm, then 3x3 max-pooling with stride 2."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.norm = BatchNorm(num_channels)
        self.pool = MaxPool(3, stride=2, padding=1)

    def forward(self, current: Tensor, copies: int = 1) -> Tensor:
        """Map (T, B, C, H, W) to (T, B, C, H', W'), H' = (H + 1) // 2.

        ``copies`` is the number of equal timesteps that each given one stands for; see `BatchNorm`.
        """
        if self.is_fused():
            kernels = dispatch.norm_kernels_for((current,), copies * current.shape[0])
            pooling = dispatch.pooling_for(current)
            if kernels is not None and pooling is not None:
                norms = Norms(self.norm)
                pooled = _FusedNormPool.apply(
                    current, self.norm.weight, self.norm.bias, norms, self.pool, kernels, pooling
                )
                return pooled.unflatten(0, current.shape[:2])
        return self.pool(self.norm(current, copies))


class _FusedNormPool(torch.autograd.Function):
    """Forward and backward pass of norm and pooling: (T, B, C, H, W) to (T * B, C, H', W')."""

    @staticmethod
    def forward(
        ctx: Any,
        current: Tensor,
        weight: Tensor,
        bias: Tensor,
        norms: Norms,
        pool: MaxPool,
        kernels: NormKernels,
        pooling: Pooling,
    ) -> Tensor:
        del weight, bias  # The norm has them.
        x = rows_of(current)
        affine = kernels.normalization(norms.of_x, x)
        pooled, where = pooling.forward_normalized(current.flatten(0, 1), affine, pool)
        ctx.save_for_backward(x, where, *affine)
        ctx.shape, ctx.norms, ctx.pool = current.shape, norms, pool
        ctx.kernels, ctx.pooling = kernels, pooling
        ctx.training = norms.of_x.training
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, where, *saved = ctx.saved_tensors
        affine, kernels, shape, norms = Affine(*saved), ctx.kernels, ctx.shape, ctx.norms
        pooled = Pooled(image_of(x, shape).flatten(0, 1), affine, where, ctx.pool)
        sums, grad = ctx.pooling.sums(kernels, pooled, grad_outputs[0])
        averages = norms.averaged(sums, training=ctx.training)
        grad_current = None
        if ctx.needs_input_grad[0]:
            grad_current = ctx.pooling.gradient(kernels, pooled, grad, averages.of_x)
            grad_current = grad_current.unflatten(0, shape[:2])
        grads = norms.gradients(sums)
        return grad_current, grads.weight, grads.bias, None, None, None, None
