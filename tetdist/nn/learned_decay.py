"""LIF neurons with a learnt decay per layer: PLIF (Fang et al., ICCV 2021).

With ``a = sigmoid(w)``, the inverse of the time constant tau, and w learnt:

    u[t] = (1 - a) * u_after_reset[t-1] + a * I[t]      (decay_input)
         = (1 - a) * u_after_reset[t-1] + I[t]          (without)

Spike and reset are those of neurons.py. w starts at ``-log(tau - 1)``, where ``tau = 1 / (1 -
decay)``. Default values and surrogate are those of spikingjelly's ParametricLIFNode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tetdist.nn import neurons
from tetdist.nn.neurons import LIF, NEURONS, SurrogateName, option

if TYPE_CHECKING:
    from torch import Tensor


@NEURONS.register("plif")
@dataclass(frozen=True, kw_only=True)
class PLIF(LIF):
    """Leaky integrate-and-fire with one learnt decay per layer."""

    decay: float = option(
        0.5, "Initial fraction of the membrane kept for the next timestep, 1 - 1/tau.", gt=0, lt=1
    )
    surrogate: SurrogateName = option("sigmoid", "Surrogate derivative of the spike.")
    surrogate_width: float = option(4.0, "Surrogate's half-width or steepness.", gt=0)
    fires_at_threshold: bool = option(True, "Fire also if the membrane is exactly at threshold.")
    decay_input: bool = option(
        True, "Multiply the input by 1 - decay, which plif's paper calls 1/tau."
    )

    def parameters(self, num_channels: int) -> dict[str, Tensor]:
        import torch

        del num_channels
        return {"w": torch.tensor(math.log((1 - self.decay) / self.decay))}

    @property
    def has_kernels(self) -> bool:
        return type(self) is PLIF and self.spike == "step"

    def for_kernels(self, timesteps: int, **parameters: Tensor) -> tuple[Tensor, ...]:
        del timesteps
        return (parameters["w"].sigmoid(),)

    def run(
        self, current: Tensor, membrane: Tensor | None, **parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        (w,) = parameters.values()
        scaled = neurons.widened(current)
        share = w.to(scaled.dtype).sigmoid()
        if self.decay_input:
            scaled = scaled * share
        spikes, membrane = neurons.run(scaled, self, membrane, decay=1 - share)
        return spikes.to(current.dtype), membrane
