"""C++ libraries: supported types, and passing of tensors."""

import ctypes
import itertools
from ctypes import c_int64
from typing import Any

import torch
from torch import Tensor

from tetdist.nn.precision import wide_type

CHANNELS = 64  # that kernels/neuron.cpp processes at a time
TYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}


def serves(*tensors: Tensor | None) -> bool:
    """Return whether the C++ kernels serve these tensors, which must share one type."""
    types = {tensor.dtype for tensor in tensors if tensor is not None}
    devices = {tensor.device.type for tensor in tensors if tensor is not None}
    return devices == {"cpu"} and len(types) == 1 and types <= TYPES.keys()


class Library:
    """A library with functions for each type and with sums made of blocks of rows."""

    def __init__(self, library: ctypes.CDLL, signatures: dict[str, tuple[Any, ...]]) -> None:
        self.library = library
        for (name, signature), dtype in itertools.product(signatures.items(), TYPES):
            self.function(name, dtype).argtypes = signature

    def function(self, name: str, dtype: torch.dtype) -> Any:
        return getattr(self.library, f"{name}_{TYPES[dtype]}")

    def num_blocks(self, rows: int, channels: int) -> int:
        count = self.library.num_blocks
        count.restype, count.argtypes = c_int64, (c_int64, c_int64)
        return int(count(rows, channels))

    def partial(self, sums: int, rows: int, like: Tensor) -> Tensor:
        """Allocate ``sums`` sums per channel for every block of rows."""
        channels = like.shape[-1]
        blocks = self.num_blocks(rows, channels)
        return torch.empty(sums * blocks * channels, dtype=wide_type(like))


def fields(names: str, kind: Any) -> tuple[tuple[str, Any], ...]:
    """Return the fields of a structure in C."""
    return tuple((name, kind) for name in names.split())


def at(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def as_wide(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(wide_type(like)).contiguous()
