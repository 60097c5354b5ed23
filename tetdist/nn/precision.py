"""The configuration's ``precision``, in torch's terms.

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

# What convolutions compute in where that is not the parameters' type.
LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None, "fp64": None}
PARAMETERS = dict.fromkeys(("bf16", "fp16", "fp32"), torch.float32) | {"fp64": torch.float64}


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The context in which a model computes forward."""
    dtype = LOW_PRECISION[precision]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def parameter_type(precision: str) -> torch.dtype:
    """The type of parameters, and of the images that enter the model."""
    return PARAMETERS[precision]
