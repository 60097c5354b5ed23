"""Losses between TET and SDT, for the study transformers_long."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tetdist.losses import register_loss


def _mean_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean over t of the cross-entropy of logits (T, B, K)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), target.repeat(len(logits)))


@register_loss("tet_without_first")
def tet_without_first(logits: Tensor, target: Tensor) -> Tensor:
    """Compute TET's cross-entropy without the first timestep."""
    return _mean_cross_entropy(logits[1:], target)


@register_loss("tet_of_means")
def tet_of_means(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the mean over t of the cross-entropy of the outputs' mean up to t."""
    steps = torch.arange(1, len(logits) + 1, device=logits.device).view(-1, 1, 1)
    return _mean_cross_entropy(logits.cumsum(0) / steps, target)
