"""Pooling and sums in C++, on a CPU: kernels/pool.cpp and kernels/sum.cpp."""

import ctypes
import functools
from ctypes import POINTER, byref, c_double, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from tetdist.nn.fast.build import load_library
from tetdist.nn.fast.native_library import Library, at, serves
from tetdist.nn.fast.pooling import Pooling, Sizes
from tetdist.nn.precision import wide_type


class _Sizes(ctypes.Structure):
    """Sizes of kernels/pool.cpp."""

    _fields_ = tuple((name, c_int64) for name in Sizes._fields)


class Pool(Pooling):
    """Max-pooling in C++."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def start(
        self, name: str, tensors: tuple[Tensor | None, ...], sizes: Sizes, levels: int | None
    ) -> None:
        dtype = next(one.dtype for one in tensors if one is not None and one.is_floating_point())
        numbers = () if levels is None else (levels,)
        function = self.library.function(name, dtype)
        function(*map(at, tensors), byref(_Sizes(*sizes)), *numbers, torch.get_num_threads())


@functools.cache
def pool() -> Pool | None:
    """Return the pooling kernels, built on first use; None without a compiler."""
    library = load_library("pool")
    if library is None:
        return None
    sizes = POINTER(_Sizes)
    signatures = {
        "forward": (*[c_void_p] * 4, sizes, c_double, c_int),
        "forward_normalized": (*[c_void_p] * 5, sizes, c_int),
        "backward": (*[c_void_p] * 3, sizes, c_int),
    }
    return Pool(Library(library, signatures))


def total(x: Tensor) -> Tensor:
    """Return the sum of all elements, () float64; exact for spikes and small sums of them.

    On a CPU torch would first copy a bfloat16 tensor to float32, which takes a fifth of an
    evaluation's time.
    """
    library = _sums() if serves(x) and x.dtype == torch.bfloat16 else None
    if library is None:
        # float32 is exact only up to 2^24, so sum one channel of one image, (H, W), at a time.
        image = tuple(range(x.ndim)[-2:])
        parts = x.sum(image, dtype=wide_type(x))
        return parts.sum(dtype=torch.float64)
    in_memory_order = sorted(range(x.ndim), key=x.stride, reverse=True)
    flat = x.permute(in_memory_order).contiguous()
    result = torch.zeros((), dtype=torch.float64)
    library.total_bfloat16(at(flat), flat.numel(), at(result), torch.get_num_threads())
    return result


@functools.cache
def _sums() -> ctypes.CDLL | None:
    library = load_library("sum")
    if library is not None:
        library.total_bfloat16.argtypes = (c_void_p, c_int64, c_void_p, c_int)
    return library
