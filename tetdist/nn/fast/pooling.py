"""Max-pooling with kernels in C++ and Triton that store a maximum's position in a byte."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tetdist.nn.fast.fused import Affine, Inputs, NormKernels, Sums
from tetdist.nn.precision import wide_type


class Sizes(NamedTuple):
    """Sizes of images, pooled images and windows, in the order of pool.cpp."""

    images: int
    height: int
    width: int
    channels: int
    out_height: int
    out_width: int
    kernel: int
    stride: int
    padding: int

    @classmethod
    def of(cls, shape: torch.Size, pool: nn.MaxPool2d) -> "Sizes":
        """Return the sizes for images (N, C, H, W) and square windows, without dilation."""
        kernel, stride, padding = pool.kernel_size, pool.stride, pool.padding
        assert isinstance(kernel, int)
        assert isinstance(stride, int)
        assert isinstance(padding, int)
        assert kernel <= 16, "positions in a window are bytes"
        assert pool.dilation == 1
        assert not pool.ceil_mode
        images, channels, height, width = shape
        rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
        return cls(images, height, width, channels, rows, columns, kernel, stride, padding)


class Pooled(NamedTuple):
    """A current x, (N, C, H, W), that was normalised and pooled, and the maxima's positions."""

    x: Tensor
    affine: Affine
    where: Tensor
    window: nn.MaxPool2d


class Pooling:
    """Max-pooling of images (N, C, H, W), from bytes or from a normalised current. A subclass
    launches the kernels.

    Attributes:
        no_norm: Arguments of its kernel `backward` in place of a norm's.
    """

    no_norm: tuple[None, ...] = ()

    def start(
        self, name: str, tensors: tuple[Tensor | None, ...], sizes: Sizes, levels: int | None
    ) -> None:
        """Start a kernel.

        Args:
            tensors: Inputs, then outputs: vectors (C,) and images (N, H, W, C), contiguous.
            levels: Bytes count multiples of ``1 / levels``; None: it reads no bytes.
        """
        raise NotImplementedError  # C++ and Triton have their own.

    def forward(
        self, packed: Tensor, levels: int, dtype: torch.dtype, pool: nn.MaxPool2d
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return each window's maximum, as ``dtype`` and in bytes, and its position."""
        sizes = Sizes.of(packed.shape, pool)
        out, where = _results(packed, sizes, dtype)
        most = torch.empty_like(where)
        self.start("forward", (rows_of_images(packed), out, most, where), sizes, levels)
        return out.permute(0, 3, 1, 2), most.permute(0, 3, 1, 2), where

    def forward_normalized(
        self, x: Tensor, affine: Affine, pool: nn.MaxPool2d
    ) -> tuple[Tensor, Tensor]:
        """Return each window's maximum of a normalised current, and its position."""
        sizes = Sizes.of(x.shape, pool)
        out, where = _results(x, sizes, x.dtype)
        wide = wide_type(x)
        gain, offset = (x.to(wide).contiguous() for x in (affine.gain, affine.offset))
        self.start("forward_normalized", (rows_of_images(x), gain, offset, out, where), sizes, None)
        return out.permute(0, 3, 1, 2), where

    def backward(
        self, grad: Tensor, where: Tensor, shape: torch.Size, pool: nn.MaxPool2d
    ) -> Tensor:
        """Return the gradient of images of the given shape."""
        sizes = Sizes.of(shape, pool)
        grad_in = grad.new_empty(sizes.images, sizes.height, sizes.width, sizes.channels)
        tensors = (rows_of_images(grad), where, *self.no_norm, grad_in)
        self.start("backward", tensors, sizes, None)
        return grad_in.permute(0, 3, 1, 2)

    def sums(self, kernels: NormKernels, pooled: Pooled, grad: Tensor) -> tuple[Sums, Tensor]:
        """Return batch norm's backward sums from the gradient of the results of
        `forward_normalized`, and the argument ``grad`` of `gradient`."""
        grad = self.backward(grad, pooled.where, pooled.x.shape, pooled.window)
        inputs = Inputs(_flat(pooled.x), affine=pooled.affine)
        return kernels.add_sums(inputs, _flat(grad)), grad

    def gradient(
        self, kernels: NormKernels, pooled: Pooled, grad: Tensor, sums: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Return the gradient of x; ``sums`` as for `NormKernels.norm_gradient`."""
        grad_x = kernels.norm_gradient(_flat(pooled.x), _flat(grad), pooled.affine, sums)
        return grad_x.view(rows_of_images(pooled.x).shape).permute(0, 3, 1, 2)


def _flat(x: Tensor) -> Tensor:
    """Return images (N, C, H, W) as (1, N * H * W, C)."""
    return rows_of_images(x).flatten(0, 2)[None]


def rows_of_images(x: Tensor) -> Tensor:
    """Return images (N, C, H, W) as (N, H, W, C), contiguous."""
    return x.permute(0, 2, 3, 1).contiguous()


def _results(like: Tensor, sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Allocate the pooled images, of ``dtype``, and the positions."""
    shape = (sizes.images, sizes.out_height, sizes.out_width, sizes.channels)
    return like.new_empty(shape, dtype=dtype), like.new_empty(shape, dtype=torch.uint8)
