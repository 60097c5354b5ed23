"""Integrate-and-fire neurons over time and their surrogate gradients: the definition.

One timestep of a neuron with membrane ``u``, input current ``I`` and threshold ``V_th``
(TET, Deng et al., ICLR 2022, equations 1 to 3):

    u[t] = decay * u_after_reset[t-1] + I[t]        (decay = 1: IF; decay < 1: LIF)
    s[t] = 1 if u[t] - V_th > 0 else 0              (strict: a membrane at the threshold is silent)
    u_after_reset[t] = u[t] * (1 - s[t])            (hard reset, to 0)
                     = u[t] - V_th * s[t]           (soft reset)

The derivative of the spike with respect to ``x = u - V_th`` does not exist where it matters; in
the backward pass a surrogate takes its place. The fused path (fused.py) computes the same and is
tested against this file.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

SurrogateName = Literal["triangle", "atan", "sigmoid", "rectangle"]
SpikeName = Literal["step", "sigmoid", "relu"]


def triangle(x: Tensor, width: float) -> Tensor:
    """``max(0, width - |x|) / width^2`` (TET, equation 5, where the width is called gamma)."""
    return (width - x.abs()).clamp(min=0) / width**2


def atan(x: Tensor, alpha: float) -> Tensor:
    """``alpha / (2 (1 + (pi/2 alpha x)^2))`` (the surrogate of SEW-ResNet, alpha = 2)."""
    return alpha / 2 / (1 + (math.pi / 2 * alpha * x) ** 2)


def sigmoid(x: Tensor, alpha: float) -> Tensor:
    """``alpha sigma(alpha x) (1 - sigma(alpha x))``: the derivative of a logistic function."""
    s = torch.sigmoid(alpha * x)
    return alpha * s * (1 - s)


def rectangle(x: Tensor, width: float) -> Tensor:
    """``1 / (2 width)`` where ``|x| < width``, else 0 (STBP, Wu et al. 2018)."""
    return (x.abs() < width).to(x.dtype) / (2 * width)


SURROGATES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "triangle": triangle,
    "atan": atan,
    "sigmoid": sigmoid,
    "rectangle": rectangle,
}


@dataclass(frozen=True, kw_only=True)
class NeuronConfig:
    """What distinguishes one neuron model from another. The defaults are the paper's LIF.

    Attributes:
        decay: Fraction of the membrane kept from one timestep to the next, in (0, 1];
            1 is the IF neuron.
        threshold: V_th, above 0, in units of the input current.
        reset: ``hard`` sets the membrane to 0 after a spike, ``soft`` subtracts the threshold.
        detach_reset: Whether the reset is a constant to the backward pass. The paper's is not.
        surrogate: Stands in for the spike's derivative in the backward pass.
        surrogate_width: Half-width of ``triangle`` and ``rectangle``; steepness alpha of ``atan``
            and ``sigmoid``. Above 0.
        spike: ``step`` fires or does not. ``sigmoid`` is the paper's control, a network without
            spikes that has no mismatch of gradients: ``sigma(alpha (u - V_th))`` with alpha
            ``surrogate_width``, and its own derivative, for which ``surrogate`` must be
            ``sigmoid``. ``relu`` is no neuron at all but ``max(0, I)`` at each timestep by itself:
            the ReLU network of the same shape, whose weights a spiking one can begin with. There is
            no fused path of the last two.

    Raises:
        ValueError: A value is outside its range.
    """

    decay: float = 0.5
    threshold: float = 1.0
    reset: Literal["hard", "soft"] = "hard"
    detach_reset: bool = False
    surrogate: SurrogateName = "triangle"
    surrogate_width: float = 1.0
    spike: SpikeName = "step"

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be in (0, 1], not {self.decay}")
        if not self.threshold > 0:
            raise ValueError(f"threshold must be above 0, not {self.threshold}")
        if self.reset not in ("hard", "soft"):
            raise ValueError(f"reset must be 'hard' or 'soft', not {self.reset!r}")
        if self.surrogate not in SURROGATES:
            raise ValueError(
                f"surrogate must be one of {', '.join(SURROGATES)}, not {self.surrogate!r}"
            )
        if not self.surrogate_width > 0:
            raise ValueError(f"surrogate_width must be above 0, not {self.surrogate_width}")
        if self.spike not in get_args(SpikeName):
            known = ", ".join(get_args(SpikeName))
            raise ValueError(f"spike must be one of {known}, not {self.spike!r}")
        if self.spike == "sigmoid" and self.surrogate != "sigmoid":
            raise ValueError(
                f"spike 'sigmoid' has its own derivative: surrogate must be 'sigmoid', not "
                f"{self.surrogate!r}"
            )


class _Spike(torch.autograd.Function):
    """Heaviside step forward, surrogate backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, surrogate: str, width: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.surrogate, ctx.width = surrogate, width
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return grad_outputs[0] * SURROGATES[ctx.surrogate](x, ctx.width), None, None


def spike(x: Tensor, config: NeuronConfig) -> Tensor:
    """Spikes (0 or 1, of the type of ``x``) of ``x = u - V_th``, with the surrogate's gradient.

    With ``spike="sigmoid"``: numbers between 0 and 1, with their own gradient.
    """
    if config.spike == "sigmoid":
        return torch.sigmoid(config.surrogate_width * x)
    return _Spike.apply(x, config.surrogate, config.surrogate_width)


def run(
    current: Tensor, config: NeuronConfig, membrane: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run neurons over time.

    The membrane is float32 (float64 for float64 input) whatever the current's type: in bfloat16
    the decayed sum would lose the very bits that decide about a spike.

    Args:
        current: Input current, (T, ...), T >= 1.
        config: The neuron.
        membrane: Membrane after reset at the end of an earlier stretch of time, shape (...);
            None is a neuron at rest (0).

    Returns:
        Spikes (T, ...) of the current's type, and the membrane after the last reset, (...).
    """
    if config.spike == "relu":
        return current.relu(), torch.zeros_like(current[0])
    compute_type = torch.promote_types(current.dtype, torch.float32)
    u = torch.zeros_like(current[0], dtype=compute_type) if membrane is None else membrane
    spikes = []
    for current_t in current.to(compute_type):
        u = config.decay * u + current_t
        s = spike(u - config.threshold, config)
        spikes.append(s)
        s_reset = s.detach() if config.detach_reset else s
        if config.reset == "hard":
            u = u * (1 - s_reset)
        else:
            u = u - config.threshold * s_reset
    return torch.stack(spikes).to(current.dtype), u


class Neuron(nn.Module):
    """Neurons that start every sample at rest: current (T, B, ...) to spikes (T, B, ...)."""

    def __init__(self, config: NeuronConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, current: Tensor) -> Tensor:
        return run(current, self.config)[0]

    def extra_repr(self) -> str:
        return str(self.config)
