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
    """The factors that `dropout.give` hands to the layers; (): they drop nothing.

    Args:
        config: Its seed, micro-batch and precision are read.
        layers: Those of `dropout.dropping`.
        step: Optimiser steps before this one.
        micro_batch: Its number among those of all processes.
        device: Where they go, while both sides go on.
    """
    if not layers:
        return ()
    count = dropout.num_factors(layers)
    uniforms = order.drop_uniforms(config.seed, step, micro_batch, config.batch.micro, count)
    factors = dropout.factors(layers, torch.from_numpy(uniforms))
    return (on_device(factors, device, parameter_type(config.precision)),)
