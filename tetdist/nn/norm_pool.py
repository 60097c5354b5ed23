"""Batch norm and max-pooling of a current, before the neurons: real numbers are pooled.

The definition is a line (`NormPool.reference`). The fast path keeps the current alone, and a byte
for each output: where in its window it was. On a GPU, where there is no kernel for that, the
normalised current and its pooling are computed again in the backward pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tetdist.nn import native, passes
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.fused import Affine, NormPasses, averaged_sums, gradients_of_norms
from tetdist.nn.norm_neuron import FusedLayer, image_of, rows_of
from tetdist.nn.packed import MaxPool


class NormPool(FusedLayer):
    """Batch norm, then the largest of 3x3 pixels at every second one.

    Args:
        num_channels: C.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.norm = BatchNorm(num_channels)
        self.pool = MaxPool(3, stride=2, padding=1)

    def forward(self, current: Tensor, copies: int = 1) -> Tensor:
        """(T, B, C, H, W) to (T, B, C, H', W'), H' = (H + 1) // 2.

        ``copies`` is how many equal timesteps each of the current's stands for; see `BatchNorm`.
        """
        if self.is_fused():
            kernels = passes.norm_passes_for((current,), copies * current.shape[0])
            if kernels is not None:
                norm = self.norm
                pooled = _FusedNormPool.apply(
                    current, norm.weight, norm.bias, norm, self.pool, kernels
                )
                return pooled.unflatten(0, current.shape[:2])
        return self.reference(current, copies)

    def reference(self, current: Tensor, copies: int = 1) -> Tensor:
        """The definition of `forward`."""
        return self.pool(self.norm(current, copies))


class _FusedNormPool(torch.autograd.Function):
    """Forward and backward of norm and pooling, (T, B, C, H, W) to (T * B, C, H', W')."""

    @staticmethod
    def forward(
        ctx: Any,
        current: Tensor,
        weight: Tensor,
        bias: Tensor,
        norm: BatchNorm,
        pool: MaxPool,
        kernels: NormPasses,
    ) -> Tensor:
        x = rows_of(current)
        affine = kernels.normalization(norm, x, weight, bias)
        where: Tensor | None = None
        library = native.pool() if native.serves(x) else None
        if library is not None:
            pooled, where = library.forward_normalized(current.flatten(0, 1), affine, pool)
        else:
            pooled = _pooled(kernels.add(x, None, affine, None), current.shape, pool)
        ctx.save_for_backward(x, where, *affine)
        ctx.shape, ctx.norm, ctx.pool, ctx.kernels = current.shape, norm, pool, kernels
        ctx.training = norm.training
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, where, *saved = ctx.saved_tensors
        affine, kernels, shape = Affine(*saved), ctx.kernels, ctx.shape
        if where is not None:
            library = native.pool()
            assert library is not None
            images = torch.Size((shape[0] * shape[1], *shape[2:]))
            of_images = library.backward(grad_outputs[0], where, images, ctx.pool)
            grad = rows_of(of_images.unflatten(0, shape[:2]))
        else:
            with torch.enable_grad():
                normalized = kernels.add(x, None, affine, None).requires_grad_()
                pooled = _pooled(normalized, shape, ctx.pool)
            (grad,) = torch.autograd.grad(pooled, normalized, grad_outputs[0])
            grad = grad.contiguous()
        sums = kernels.add_sums(x, None, affine, None, grad)
        of_x, _ = averaged_sums(sums, ctx.norm, None, training=ctx.training)
        grad_current = None
        if ctx.needs_input_grad[0]:
            grad_current = image_of(kernels.norm_gradient(x, grad, affine, of_x), shape)
        grad_weight, grad_bias, *_ = gradients_of_norms(sums, ctx.norm, None)
        return grad_current, grad_weight, grad_bias, None, None, None


def _pooled(rows: Tensor, shape: torch.Size, pool: MaxPool) -> Tensor:
    images = image_of(rows, shape).flatten(0, 1)
    return F.max_pool2d(images, pool.kernel_size, pool.stride, pool.padding)
