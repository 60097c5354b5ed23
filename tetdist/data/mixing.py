"""Mixup and CutMix: each sample is mixed with another one of its micro-batch.

Partners and weights are functions of the position in the run (transforms.py), so they do not
depend on the number of processes.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tetdist.data import transfer
from tetdist.data.boxes import inside
from tetdist.data.transforms import Mix


class DeviceMix(NamedTuple):
    """A `Mix` as float64 tensors on the device, also for the boxes' integers."""

    share: Tensor
    pixels: Tensor
    boxes: Tensor
    mirrored: bool

    def others(self, samples: Tensor) -> Tensor:
        """Return the partner of each of (B, ...) samples."""
        return samples.flip(0) if self.mirrored else samples.roll(1, 0)


def mixed(images: Tensor, labels: Tensor, mix: Mix, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return mixed images, and their targets of the same type, on their device."""
    there = on_device(mix, images.device)
    targets = mixed_targets(labels, there, num_classes, images.dtype)
    return mixed_images(images, there), targets


def on_device(mix: Mix, device: torch.device) -> DeviceMix:
    """Copy a micro-batch's numbers to the device, all at once."""
    numbers = np.column_stack([mix.share, mix.pixels, mix.boxes])
    there = transfer.on_device(torch.from_numpy(numbers), device)
    return DeviceMix(there[:, 0], there[:, 1], there[:, 2:], mix.mirrored)


def mixed_images(images: Tensor, mix: DeviceMix) -> Tensor:
    """Mix images (B, 3, H, W), or event frames (B, T, 2, H, W), all timesteps alike."""
    ones = (1,) * (images.ndim - 1)
    kept = mix.pixels.to(images.dtype).view(-1, *ones)
    height, width = images.shape[-2:]
    swapped = inside(mix.boxes, height, width).view(-1, *ones[:-2], height, width)
    others = mix.others(images)
    return torch.where(swapped, others, kept * images + (1 - kept) * others)


def mixed_targets(labels: Tensor, mix: DeviceMix, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Return the class probabilities (B, K) of mixed samples with labels (B,).

    Cross-entropy is linear in its target: with these it equals lambda times the cross-entropy with
    the sample's class plus (1 - lambda) times that with the partner's.
    """
    targets = F.one_hot(labels, num_classes).to(dtype)
    kept = mix.share.to(dtype)[:, None]
    return kept * targets + (1 - kept) * mix.others(targets)
