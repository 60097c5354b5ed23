"""The configuration's ``precision``, in torch's terms.

fp32    parameters, activations and gradients in float32
tf32    the same, and a GPU's convolutions and matrix products round their inputs to TensorFloat-32,
        ten bits of mantissa, for speed; on a CPU there is no such thing
bf16    convolutions in bfloat16 under autocast; parameters, gradients, membranes and loss in
        float32
fp16    the same with float16, whose loss has to be scaled (see training/engines/base.py)
fp64    everything in float64: slow, and without the rounding that flips spikes, so that two
        ways to compute the same can be told apart from two that do not
"""

import contextlib
import os
from typing import Any

import torch
from torch import Tensor, nn

# What convolutions compute in where that is not the parameters' type.
LOW_PRECISION: dict[str, torch.dtype | None] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": None,
    "fp32": None,
    "fp64": None,
}
PARAMETERS = dict.fromkeys(LOW_PRECISION, torch.float32) | {"fp64": torch.float64}


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The context in which a model computes forward."""
    dtype = LOW_PRECISION[precision]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def parameter_type(precision: str) -> torch.dtype:
    """The type of parameters, and of the images that enter the model."""
    return PARAMETERS[precision]


def choose_algorithms(precision: str, *, deterministic: bool = False) -> None:
    """Have torch's GPU libraries compute in the configured precision, for all of this process.

    Args:
        precision: The configuration's. Left to itself torch lets convolutions in float32 round to
            TensorFloat-32, so that "fp32" would not be what it says.
        deterministic: Whether every algorithm has to repeat to the bit. If not, cuDNN tries its
            algorithms at the first batch of each shape and keeps the fastest.
    """
    tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        # cuBLAS reads it when it is first used, and torch refuses to go on without it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def place(model: nn.Module, device: torch.device, precision: str) -> None:
    """Move a model that is not trained to where it computes, in the type of its parameters.

    On a GPU the weights of convolutions become channels_last, as activations are: else each
    convolution would change the layout of its weight every time.
    """
    model.to(device, parameter_type(precision))
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub lacks it


def exact(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The context in which matrix products compute in their inputs' type.

    Args:
        x: On the device that is meant.
    """
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)
