"""The configuration's ``precision`` in torch's terms.

fp32    parameters, activations and gradients in float32
tf32    the same, and a GPU's convolutions and matrix products round their inputs to TensorFloat-32,
        ten bits of mantissa, for speed; on a CPU there is no such thing
bf16    convolutions in bfloat16 under autocast; parameters, gradients, membranes and loss in
        float32
fp16    the same with float16, whose loss has to be scaled (see training/engines/base.py)
fp64    everything in float64: slow, but without rounding that flips spikes, so that a difference
        between two implementations shows whether they compute the same
"""

import contextlib
import itertools
import os
from typing import Any

import torch
from torch import Tensor, nn

# Compute type of convolutions, if it differs from the parameters' type.
LOW_PRECISION: dict[str, torch.dtype | None] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": None,
    "fp32": None,
    "fp64": None,
}
PARAMETERS = dict.fromkeys(LOW_PRECISION, torch.float32) | {"fp64": torch.float64}


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Return the context for a model's forward pass."""
    dtype = LOW_PRECISION[precision]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def parameter_type(precision: str) -> torch.dtype:
    """Return the type of parameters and of the model's input images."""
    return PARAMETERS[precision]


def choose_algorithms(precision: str, *, deterministic: bool = False) -> None:
    """Set the precision of torch's GPU libraries for this process.

    Args:
        precision: The configuration's. By default torch lets float32 convolutions round to
            TensorFloat-32, so "fp32" would not be float32.
        deterministic: True if every algorithm must be bitwise reproducible. If not, cuDNN tries its
            algorithms at the first batch of each shape and keeps the fastest.
    """
    tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        # cuBLAS reads it at its first use, and torch requires it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def place(model: nn.Module, device: torch.device, precision: str) -> None:
    """Move a model for inference to its device, in its parameter type.

    On a GPU convolution weights become channels_last, like activations; otherwise each convolution
    would convert its weight every time.
    """
    model.to(device, parameter_type(precision))
    if device.type == "cuda":
        lay_out(model, torch.channels_last)


def lay_out(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Lay out tensors of four dimensions, such as 2D convolutions' weights; others have no channels
    last."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.to(memory_format=memory_format)


def wide_type(x: Tensor) -> torch.dtype:
    """Return the type in which sums of a tensor's numbers are computed: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def exact(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which matrix products compute in their inputs' type."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)
