"""Convolutions of spikes that skip their zeros, in C++, on a CPU: kernels/zeros.cpp.

A layer skips by rule, never by the clock or the batch: if its input is spikes of 0 and 1, where
that is known to pay at the rates at which neurons fire (docs/performance.md has the table).
"""

import contextlib
import ctypes
import functools
import threading
from collections.abc import Iterator
from ctypes import POINTER, byref, c_bool, c_int, c_int64, c_void_p
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from tetdist.nn.fast import build
from tetdist.nn.fast.native_library import at, fields

# Positions listed at a time: 32 MB.
POSITIONS = 2**24
BLOCK = 64  # output channels that the kernel adds up together
# Of input and output. With fewer, dense is faster from 13 to 33 % spikes on; from 16 to 32, always.
FEWEST_CHANNELS = (32, BLOCK)
_TYPES = {
    torch.uint8: "uint8",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
}
# The result's type, by that of the weights.
_RESULTS = {torch.int8: torch.int32}


class _Sizes(ctypes.Structure):
    """Sizes of kernels/zeros.cpp."""

    _fields_ = (
        *fields("images height width channels", c_int64),
        *fields("out_height out_width out_channels kernel stride padding", c_int64),
    )


# --- the rule -----------------------------------------------------------------------------------

# The types that all processes of a run skip in; None: those of this process.
_agreed: frozenset[torch.dtype] | None = None


def agree(types: frozenset[torch.dtype]) -> None:
    """Skip in these types alone, so that all processes of a run round alike."""
    global _agreed
    _agreed = types


def types() -> frozenset[torch.dtype]:
    """Return the types in which convolutions skip: the agreed ones, or those of this process."""
    return types_here() if _agreed is None else _agreed


@functools.cache
def types_here() -> frozenset[torch.dtype]:
    """Return the types in which skipping pays on this processor, if the kernels can be built.

    With AVX2 it breaks even where 20 % are spikes, which many layers exceed; AMX multiplies
    bfloat16 faster.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or library() is None:
        return frozenset()
    has_amx = "amx_bf16" in build.processor().split()
    return frozenset({torch.float32, torch.int8} | (set() if has_amx else {torch.bfloat16}))


class Layer(NamedTuple):
    """A 3x3 convolution with zero padding of one pixel.

    Attributes:
        owner: The module that its weights, laid out, are kept for in streams.
        weight: (C', C, 3, 3).
        bias: (C',), or None.
        stride: 1 or 2.
    """

    owner: nn.Module
    weight: Tensor
    bias: Tensor | None
    stride: int


def layer_for(conv: nn.Conv2d, x: Tensor, dtype: torch.dtype) -> Layer | None:
    """Return a convolution of spikes of 0 and 1 as one that skips their zeros; None if it does not.

    float32 breaks even where half of the inputs are spikes. bfloat16 breaks even at a third, and
    its gradients gain nothing, so it skips in evaluation alone.
    """
    is_known = (
        conv.kernel_size == (3, 3)
        and conv.stride in ((1, 1), (2, 2))
        and conv.padding == (1, 1)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )
    trains_dense = conv.training and dtype != torch.float32
    if trains_dense or not (is_known and serves(x, conv.weight, dtype)):
        return None
    return Layer(conv, conv.weight, conv.bias, int(conv.stride[0]))


def serves(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the kernels convolve spikes (N, C, H, W), and gain by it, in a type here."""
    out_channels, channels, *_ = weight.shape
    fewest, fewest_out = FEWEST_CHANNELS
    is_wide = channels >= fewest and out_channels >= fewest_out
    fits = channels * x.shape[3] < 2**16  # positions in a row are of 16 bits
    return x.device.type == "cpu" and is_wide and fits and dtype in types()


# --- the kernels --------------------------------------------------------------------------------


class Spikes(NamedTuple):
    """Positions of the spikes of some images."""

    positions: Tensor
    starts: Tensor
    sizes: _Sizes


def convolve(x: Tensor, layer: Layer, dtype: torch.dtype) -> Tensor | None:
    """Return the convolution of (N, C, H, W); None if a value is neither 0 nor 1.

    Args:
        x: Spikes as numbers, or in bytes.
        dtype: Type of the weights that are added up, and of the result; int8: int32.
    """
    result = _RESULTS.get(dtype, dtype)
    laid = _laid_out(layer, dtype)
    bias = None if layer.bias is None else layer.bias.detach().to(result)
    forward, outputs = getattr(library(), f"forward_{_TYPES[dtype]}"), []
    for _, spikes in _parts(x, layer):
        if spikes is None:
            return None
        sizes = spikes.sizes
        shape = sizes.images, sizes.out_height, sizes.out_width, sizes.out_channels
        outputs.append(torch.empty(shape, dtype=result))
        pointers = map(at, (spikes.positions, spikes.starts, laid, bias, outputs[-1]))
        forward(*pointers, byref(sizes), torch.get_num_threads())
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out.permute(0, 3, 1, 2)


def weight_gradient(x: Tensor, grad: Tensor, layer: Layer) -> Tensor:
    """Return the weight's gradient from the output's, (N, C', H', W'), float32."""
    kernels, total = library(), torch.zeros(layer.weight.shape)
    assert kernels is not None
    rows = grad.permute(0, 2, 3, 1).contiguous()
    for images, spikes in _parts(x, layer):
        assert spikes is not None
        pointers = map(at, (spikes.positions, spikes.starts, rows[images], total))
        kernels.weight_gradient(*pointers, byref(spikes.sizes), torch.get_num_threads())
    return total


def _parts(x: Tensor, layer: Layer) -> Iterator[tuple[slice, Spikes | None]]:
    """Find the spikes of a part of the images after another; None: a value is not 0 or 1."""
    rows = x.permute(0, 2, 3, 1).contiguous()
    images, height, width, channels = rows.shape
    kernel = layer.weight.shape[-1]
    padding = kernel // 2
    out_sides = [(side + 2 * padding - kernel) // layer.stride + 1 for side in (height, width)]
    room = width * channels + 32  # as in zeros.cpp
    step = max(1, POSITIONS // (height * room))
    find = getattr(library(), f"find_{_TYPES[x.dtype]}")
    for first in range(0, images or 1, step):  # a part without images, too
        part = rows[first : first + step]
        sides = (*out_sides, len(layer.weight), kernel, layer.stride, padding)
        sizes = _Sizes(len(part), height, width, channels, *sides)
        positions = torch.empty(len(part) * height * room, dtype=torch.int16)
        starts = torch.empty(len(part) * height * (width + 1), dtype=torch.int32)
        pointers = map(at, (part, positions, starts))
        are_spikes = find(*pointers, byref(sizes), torch.get_num_threads())
        spikes = Spikes(positions, starts, sizes) if are_spikes else None
        yield slice(first, first + step), spikes


# Laid-out weights of convolutions in streams, with their place, version and type, and the weights,
# which are held so that no others take their place in memory.
_kept: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], Tensor, Tensor]] = WeakKeyDictionary()
_thread = threading.local()


@contextlib.contextmanager
def keeping_weights() -> Iterator[None]:
    """Lay out weights once in this thread, and anew when an operation of torch has changed them.

    Weights written to through ``.data`` are not seen to change.
    """
    _forget_after_optimizers()
    before = getattr(_thread, "keeps", False)
    _thread.keeps = True
    try:
        yield
    finally:
        _thread.keeps = before


@functools.cache
def _forget_after_optimizers() -> None:
    # Fused optimisers leave the version of what they change.
    register_optimizer_step_post_hook(lambda *_: _kept.clear())


def _laid_out(layer: Layer, dtype: torch.dtype) -> Tensor:
    weight = layer.weight
    keeps = getattr(_thread, "keeps", False) and not weight.is_inference()
    key = (weight.data_ptr(), weight._version, dtype) if keeps else ()
    if keeps and (entry := _kept.get(layer.owner)) is not None and entry[0] == key:
        return entry[2]
    dense = weight.detach().to(dtype).contiguous()
    laid = dense.new_empty(-(-len(dense) // BLOCK) * BLOCK * dense[0].numel())
    sizes = _Sizes(channels=dense.shape[1], out_channels=len(dense), kernel=dense.shape[2])
    lay_out = getattr(library(), f"lay_out_{_TYPES[dtype]}")
    lay_out(at(dense), at(laid), byref(sizes), torch.get_num_threads())
    if keeps:
        _kept[layer.owner] = key, weight.detach(), laid
    return laid


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the kernels, built on first use; None without a compiler."""
    loaded = build.load_library("zeros")
    if loaded is None:
        return None
    sizes = POINTER(_Sizes)
    for name in ("uint8", "float32", "bfloat16"):
        find = getattr(loaded, f"find_{name}")
        find.restype, find.argtypes = c_bool, (*[c_void_p] * 3, sizes, c_int)
    for name in ("float32", "bfloat16", "int8"):
        getattr(loaded, f"lay_out_{name}").argtypes = (*[c_void_p] * 2, sizes, c_int)
        getattr(loaded, f"forward_{name}").argtypes = (*[c_void_p] * 5, sizes, c_int)
    loaded.weight_gradient.argtypes = (*[c_void_p] * 4, sizes, c_int)
    return loaded
