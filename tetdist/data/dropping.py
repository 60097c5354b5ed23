"""Dropout factors of a micro-batch, by the samples' positions in the global batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tetdist import order
from tetdist.config.schema import RunConfig
from tetdist.data.transfer import on_device
from tetdist.nn import dropout
from tetdist.nn.precision import parameter_type


def drop_factors(
    config: RunConfig,
    layers: Sequence[dropout.Dropout],
    step: int,
    micro_batch: int,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """Return the factors for `dropout.set_factors`; () without layers that drop.

    Args:
        layers: The layers of `dropout.dropping`.
        step: Optimiser steps before this one.
        micro_batch: Number of the micro-batch among those of all processes.
    """
    if not layers:
        return ()
    count = dropout.num_factors(layers)
    uniforms = order.drop_uniforms(config.seed, step, micro_batch, config.batch.micro, count)
    factors = dropout.factors(layers, torch.from_numpy(uniforms))
    return (on_device(factors, device, parameter_type(config.precision)),)
