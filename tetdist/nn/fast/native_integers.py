"""Neurons in integers, in C++, on a CPU: kernels/integers.cpp."""

import ctypes
import functools
from ctypes import POINTER, byref, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from tetdist.nn.fast import build
from tetdist.nn.fast.native_library import at, fields


class _Neurons(ctypes.Structure):
    """Neurons of kernels/integers.cpp."""

    _fields_ = (
        *fields("a b bias thresholds step start spikes end", c_void_p),
        *fields("timesteps rows channels levels shared_a shared_b", c_int64),
        *fields("shift_a shift_b factor bits", c_int64),
    )


def fire(
    currents: list[Tensor],
    shifts: list[int],
    values: dict[str, Tensor],
    decay: tuple[int, int],
    membrane: Tensor | None,
    timesteps: int,
) -> tuple[Tensor, Tensor]:
    """Return spikes (T, N, C), uint8, and membranes after them (N, C), int32.

    Args:
        currents: One or two, (T or 1, N, C), int32.
        shifts: Their shifts to the left.
        values: int32 by channel: ``bias`` (C,), ``thresholds`` (D, C), perhaps ``step`` (C,).
        decay: m and r of m / 2^r.
        membrane: Membranes before, (N, C); None: at rest.
    """
    kernels = library()
    assert kernels is not None
    first, *second = [current.contiguous() for current in currents]
    other = second[0] if second else None
    rows, channels = first.shape[1:]
    spikes = torch.empty(timesteps, rows, channels, dtype=torch.uint8)
    end = torch.empty(rows, channels, dtype=torch.int32)
    parameters = [values["bias"], values["thresholds"], values.get("step")]
    pointers = map(at, (first, other, *parameters, membrane, spikes, end))
    shared = len(first) == 1, other is not None and len(other) == 1
    sizes = timesteps, rows, channels, len(values["thresholds"]), *shared
    job = _Neurons(*pointers, *sizes, shifts[0], shifts[-1], *decay)
    kernels.fire(byref(job), torch.get_num_threads())
    return spikes, end


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the kernel, built on first use; None without a compiler."""
    loaded = build.load_library("integers")
    if loaded is not None:
        loaded.fire.argtypes = (POINTER(_Neurons), c_int)
    return loaded
