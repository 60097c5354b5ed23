"""A loss between TET and SDT, for the study transformers_long."""

import torch.nn.functional as F
from torch import Tensor

from tetdist.losses import register_loss


@register_loss("tet_without_first")
def tet_without_first(logits: Tensor, target: Tensor) -> Tensor:
    """Compute TET's cross-entropy without the first timestep."""
    logits = logits[1:]
    return F.cross_entropy(logits.flatten(0, 1).float(), target.repeat(len(logits)))
