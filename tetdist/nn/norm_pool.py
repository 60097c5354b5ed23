"""Batch norm and max-pooling of a current, before the neurons: real numbers are pooled."""

from torch import Tensor, nn

from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.packed import MaxPool


class NormPool(nn.Module):
    """Batch norm, then the largest of 3x3 pixels at every second one.

    Args:
        num_channels: C.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.norm = BatchNorm(num_channels)
        self.pool = MaxPool(3, stride=2, padding=1)

    def forward(self, current: Tensor, copies: int = 1) -> Tensor:
        """(T, B, C, H, W) to (T, B, C, H', W'), H' = (H + 1) // 2.

        ``copies`` is how many equal timesteps each of the current's stands for; see `BatchNorm`.
        """
        return self.pool(self.norm(current, copies))
