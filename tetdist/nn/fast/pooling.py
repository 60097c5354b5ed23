"""Max-pooling with kernels in C++ and Triton that store a maximum's position in a byte."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tetdist.nn.fast.fused import Affine


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


class Pooling:
    """Max-pooling of images (N, C, H, W), from bytes or from a normalised current. A subclass
    launches the kernels."""

    def start(
        self, name: str, tensors: tuple[Tensor, ...], sizes: Sizes, levels: int | None
    ) -> None:
        """Start a kernel.

        Args:
            name: Name of its function.
            tensors: Inputs, then outputs: vectors (C,) and images (N, H, W, C), contiguous.
            sizes: Sizes of the pooling.
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
        self.start("forward", (_rows(packed), out, most, where), sizes, levels)
        return out.permute(0, 3, 1, 2), most.permute(0, 3, 1, 2), where

    def forward_normalized(
        self, x: Tensor, affine: Affine, pool: nn.MaxPool2d
    ) -> tuple[Tensor, Tensor]:
        """Return each window's maximum of a normalised current, and its position."""
        sizes = Sizes.of(x.shape, pool)
        out, where = _results(x, sizes, x.dtype)
        wide = torch.promote_types(x.dtype, torch.float32)
        gain, offset = (one.to(wide).contiguous() for one in affine[:2])
        self.start("forward_normalized", (_rows(x), gain, offset, out, where), sizes, None)
        return out.permute(0, 3, 1, 2), where

    def backward(
        self, grad: Tensor, where: Tensor, shape: torch.Size, pool: nn.MaxPool2d
    ) -> Tensor:
        """Return the gradient of images of the given shape."""
        sizes = Sizes.of(shape, pool)
        grad_in = grad.new_empty(sizes.images, sizes.height, sizes.width, sizes.channels)
        self.start("backward", (_rows(grad), where, grad_in), sizes, None)
        return grad_in.permute(0, 3, 1, 2)


def _rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def _results(like: Tensor, sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Allocate the pooled images, of ``dtype``, and the positions."""
    shape = (sizes.images, sizes.out_height, sizes.out_width, sizes.channels)
    return like.new_empty(shape, dtype=dtype), like.new_empty(shape, dtype=torch.uint8)
