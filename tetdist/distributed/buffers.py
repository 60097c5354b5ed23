"""Many tensors in one, so that a few kernels and one collective serve them all."""

import torch
from torch import Tensor


def one_buffer_for(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A flat buffer for tensors of one type, and the part of it for each of them.

    A part has its tensor's strides, so that elements go into it in the order of memory: on a GPU a
    few kernels copy all tensors, and not one each.
    """
    flat = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors))
    parts, start = [], 0
    for tensor in tensors:
        # Those of a tensor that fills its memory without gaps, which a gradient nearly always does.
        strides = torch.empty_like(tensor, device="meta").stride()
        parts.append(flat.as_strided(tensor.shape, strides, start))
        start += tensor.numel()
    return flat, parts
