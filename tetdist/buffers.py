"""Flat buffers that hold many tensors, so that a few kernels and one collective serve them all, and
copies of tensors on the host."""

from typing import Any

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


def copy_to_host(value: Any) -> Any:
    """Copy the tensors in dicts and lists to the host, in their memory layout.

    The host does not wait for a GPU, whose copies are complete once its stream gets there.
    """
    if isinstance(value, Tensor):
        # A GPU copies in the background only to pinned memory, which torch keeps for the next copy.
        copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return copy.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        return {key: copy_to_host(one) for key, one in value.items()}
    return [copy_to_host(one) for one in value] if isinstance(value, list) else value
