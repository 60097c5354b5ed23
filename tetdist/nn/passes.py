"""What a variant's passes over memory are, whoever provides them."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Passes(NamedTuple):
    """The passes of one variant: neuron, T, whether all timesteps share one x, whether membranes
    are carried on, and whether spikes are packed, too."""

    timesteps: int
    statistics: Callable[..., tuple[Tensor, Tensor]]
    spikes: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
    current_gradient: Callable[..., tuple[Tensor | None, ...]]
    input_gradient: Callable[..., Tensor]
