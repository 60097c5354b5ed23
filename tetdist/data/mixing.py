"""Mixup and CutMix: each sample with the one before it in its micro-batch.

Who is mixed with whom, and how much, are functions of the position in the run (transforms.py), so
that the result does not depend on the number of processes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tetdist.data.transforms import Mix


def mixed_images(images: Tensor, mix: Mix) -> Tensor:
    """Mix images (B, 3, H, W), or event frames (B, T, 2, H, W), all timesteps alike."""
    ones = (1,) * (images.ndim - 1)
    kept = torch.as_tensor(mix.pixels, dtype=images.dtype, device=images.device).view(-1, *ones)
    boxes = torch.as_tensor(mix.boxes, device=images.device).view(-1, 4, *ones[:-2], 1, 1)
    top, left, bottom, right = boxes.unbind(1)
    rows = torch.arange(images.shape[-2], device=images.device)[:, None]
    columns = torch.arange(images.shape[-1], device=images.device)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    others = images.roll(1, 0)
    return torch.where(inside, others, kept * images + (1 - kept) * others)


def mixed_targets(labels: Tensor, mix: Mix, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Shares of the classes (B, K) of mixed samples with labels (B,).

    Cross-entropy is linear in its target, so that with these it is lambda times the one with the
    sample's class plus (1 - lambda) times the one with the other's.
    """
    targets = F.one_hot(labels, num_classes).to(dtype)
    kept = torch.as_tensor(mix.share, dtype=dtype, device=labels.device)[:, None]
    return kept * targets + (1 - kept) * targets.roll(1, 0)
