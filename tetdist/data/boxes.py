"""Rectangles of pixels."""

import torch
from torch import Tensor


def inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return which pixels are in boxes (B, 4) of top, left, bottom, right: (B, H, W) bool."""
    top, left, bottom, right = boxes[:, :, None, None].unbind(1)
    rows = torch.arange(height, device=boxes.device)[:, None]
    columns = torch.arange(width, device=boxes.device)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
