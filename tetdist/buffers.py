"""Flat buffers that hold many tensors, so that a few kernels and one collective serve them all."""

import torch
from torch import Tensor


def one_buffer_for(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Make a flat buffer for tensors of one type; return it and each tensor's part of it.

    A part has its tensor's strides, so that elements are copied in memory order. On a GPU a few
    kernels then copy all tensors, instead of one kernel per tensor.
    """
    flat = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors))
    parts, start = [], 0
    for tensor in tensors:
        # Strides of a dense tensor; nearly all gradients are dense.
        strides = torch.empty_like(tensor, device="meta").stride()
        parts.append(flat.as_strided(tensor.shape, strides, start))
        start += tensor.numel()
    return flat, parts
