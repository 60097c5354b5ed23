"""Flat buffers that hold many tensors, so that a few kernels and one collective serve them all."""

import torch
from torch import Tensor


def in_one_buffer(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Copy tensors of one type into a flat buffer; return it and each tensor's part of it.

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
    torch._foreach_copy_(parts, tensors)
    return flat, parts
