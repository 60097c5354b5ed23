"""Pooling and sums in C++, on a CPU: kernels/pool.cpp and kernels/sum.cpp."""

import ctypes
import functools
from ctypes import POINTER, byref, c_double, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from tetdist.nn.fast.build import load_library
from tetdist.nn.fast.fused import Affine
from tetdist.nn.fast.native_library import TYPES, as_wide, at, serves, threads
from tetdist.nn.window import Window


class _Sizes(ctypes.Structure):
    """Sizes of kernels/pool.cpp."""

    _fields_ = tuple(
        (name, c_int64)
        for name in (
            *("images", "height", "width", "channels", "out_height", "out_width"),
            *("kernel", "stride", "padding"),
        )
    )


class Pool:
    """Max-pooling of images (N, C, H, W): of those whose values are in bytes, too, and of currents
    that are normalised."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        for name in TYPES.values():
            function = getattr(library, f"forward_{name}")
            function.argtypes = (*[c_void_p] * 4, POINTER(_Sizes), c_double, c_int)
            function = getattr(library, f"forward_normalized_{name}")
            function.argtypes = (*[c_void_p] * 5, POINTER(_Sizes), c_int)
            function = getattr(library, f"backward_{name}")
            function.argtypes = (*[c_void_p] * 3, POINTER(_Sizes), c_int)

    def forward(
        self, packed: Tensor, levels: int, dtype: torch.dtype, pool: torch.nn.MaxPool2d
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The largest of each window, of ``dtype`` and in bytes, and where it was."""
        sizes = _pool_sizes(packed.shape, pool)
        images, channels = packed.shape[:2]
        shape = (images, sizes.out_height, sizes.out_width, channels)
        out = torch.empty(shape, dtype=dtype)
        most, where = torch.empty(2, *shape, dtype=torch.uint8)
        rows = packed.permute(0, 2, 3, 1).contiguous()
        function = getattr(self.library, f"forward_{TYPES[dtype]}")
        function(*map(at, (rows, out, most, where)), byref(sizes), levels, threads())
        return out.permute(0, 3, 1, 2), most.permute(0, 3, 1, 2), where

    def forward_normalized(
        self, x: Tensor, affine: Affine, pool: torch.nn.MaxPool2d
    ) -> tuple[Tensor, Tensor]:
        """The largest of each window of a current (N, C, H, W), normalised, and where it was."""
        sizes = _pool_sizes(x.shape, pool)
        images, channels = x.shape[:2]
        out = torch.empty(images, sizes.out_height, sizes.out_width, channels, dtype=x.dtype)
        where = torch.empty(out.shape, dtype=torch.uint8)
        rows = x.permute(0, 2, 3, 1).contiguous()
        gain, offset = as_wide(affine.gain, x), as_wide(affine.offset, x)
        function = getattr(self.library, f"forward_normalized_{TYPES[x.dtype]}")
        function(*map(at, (rows, gain, offset, out, where)), byref(sizes), threads())
        return out.permute(0, 3, 1, 2), where

    def backward(
        self, grad: Tensor, where: Tensor, shape: torch.Size, pool: torch.nn.MaxPool2d
    ) -> Tensor:
        """The gradient of the images, whose shape is given."""
        images, channels, height, width = shape
        sizes = _pool_sizes(shape, pool)
        rows = grad.permute(0, 2, 3, 1).contiguous()
        grad_in = torch.empty(images, height, width, channels, dtype=grad.dtype)
        function = getattr(self.library, f"backward_{TYPES[grad.dtype]}")
        function(*map(at, (rows, where, grad_in)), byref(sizes), threads())
        return grad_in.permute(0, 3, 1, 2)


def _pool_sizes(shape: torch.Size, pool: torch.nn.MaxPool2d) -> _Sizes:
    window = Window.of(pool)
    images, channels, *sides = shape
    return _Sizes(images, *sides, channels, *map(window.outputs, sides), *window)


@functools.cache
def pool() -> Pool | None:
    """Pooling, compiled if it never was on this machine; None without a compiler."""
    library = load_library("pool")
    return None if library is None else Pool(library)


def total(x: Tensor) -> Tensor:
    """Sum of all elements, () float64; exact for spikes and small sums of them.

    On a CPU torch would first make a float32 copy of a bfloat16 tensor, which takes a fifth of the
    time of an evaluation.
    """
    library = _sums() if serves(x) and x.dtype == torch.bfloat16 else None
    if library is None:
        # float32 is exact up to 2^24 only, so that it has to do for one image of a channel, (H, W).
        image = tuple(range(x.ndim)[-2:])
        parts = x.sum(image, dtype=torch.promote_types(x.dtype, torch.float32))
        return parts.sum(dtype=torch.float64)
    in_memory_order = sorted(range(x.ndim), key=x.stride, reverse=True)
    flat = x.permute(in_memory_order).contiguous()
    result = torch.zeros((), dtype=torch.float64)
    library.total_bfloat16(at(flat), flat.numel(), at(result), threads())
    return result


@functools.cache
def _sums() -> ctypes.CDLL | None:
    library = load_library("sum")
    if library is not None:
        library.total_bfloat16.argtypes = (c_void_p, c_int64, c_void_p, c_int)
    return library
