"""Weights rounded to whole numbers times a scale, for networks that are exported in int8.

In phases with ``quantize``, forward and backward passes compute with rounded weights, and the
optimiser applies those passes' gradients to the float weights: the straight-through estimator. The
rounded weights take the float weights' place in memory during the passes, so that layers, kernels,
CUDA graphs, checkpoints and averages need not know of them.

Scales are those of the conversion (apps/weights/integers.py) as far as a layer alone determines
them: the factors that a batch norm or a learnt decay gives to a channel do not change its whole
numbers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Largest whole weight. Without VNNI, processors add two products of a byte and a weight in 16 bits,
# so weights of inputs above 127 are smaller.
MOST, MOST_OF_BYTES = 127, 63


@torch.no_grad()
def round_weights(model: nn.Module, std: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
    """Round the weights of convolutions and linear layers in place; rounded ones do not change.

    Each output channel has a scale; the classifier has one for all classes.

    Args:
        model: A network whose first convolution takes pixels or counts of events.
        std: Divisors of that input's channels, which the conversion moves into the weights; empty:
            the input is not divided.

    Returns:
        The weights, and their values before.
    """
    most, before = MOST_OF_BYTES, []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module.weight.detach()
            before.append((weight, weight.clone()))
            wide = weight.double()
            for channel, divisor in enumerate(std):
                wide[:, channel] /= divisor
            is_classifier = module is getattr(model, "fc", None)
            across = tuple(range(0 if is_classifier else 1, weight.ndim))
            scale = wide.abs().amax(across, keepdim=True) / most
            scale = torch.where(scale > 0, scale, 1)
            wide = (wide / scale).round() * scale
            for channel, divisor in enumerate(std):
                wide[:, channel] *= divisor
            weight.copy_(wide)
            most, std = MOST, ()
    return before


@contextmanager
def rounded_weights(
    model: nn.Module, std: Sequence[float], *, active: bool = True
) -> Iterator[None]:
    """Make the model compute with rounded weights within this context, if active.

    Do not update or save the model in it; arguments as in `round_weights`.
    """
    before = round_weights(model, std) if active else []
    try:
        yield
    finally:
        for weight, values in before:
            weight.copy_(values)
