"""What the configuration's ``precision`` means in torch.

fp32    parameters, activations and gradients in float32
bf16    convolutions in bfloat16 under autocast; parameters, gradients, membranes and loss in
        float32
fp16    the same with float16, whose loss has to be scaled (see training/engines/base.py)
fp64    everything in float64: slow, and without the rounding that flips spikes, so that two
        ways to compute the same can be told apart from two that do not
"""

import contextlib
from typing import Any

import torch

LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The context in which a model computes forward."""
    dtype = LOW_PRECISION.get(precision)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def parameter_type(precision: str) -> torch.dtype:
    """The type of parameters, and of the images that enter the model."""
    return torch.float64 if precision == "fp64" else torch.float32
