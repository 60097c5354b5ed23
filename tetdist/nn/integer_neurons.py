"""Neurons that fire up to D spikes in a timestep: I-LIF and NI-LIF.

I-LIF (Luo et al., ECCV 2024, arXiv 2407.20708) is trained on integer numbers of spikes:

    u[t] = decay * u_after_reset[t-1] + I[t]
    c[t] = round(clip(u[t] / V_th, 0, D))               (half to even)
    u_after_reset[t] = u[t] - V_th * c[t]

The neuron sends c, whose derivative with respect to ``u / V_th`` is taken as 1 in [0, D], including
the ends, and 0 outside. A device runs each timestep as D sub-timesteps; the neuron fires in c of
them, and the next layer adds its weights c times, which gives the same
(tests/evaluation/test_kinds_of_neurons.py computes that).

NI-LIF (Yao et al., Spike-driven Transformer V3) sends ``c / D``, as if the weights were divided by
D. At T=1, or with ``decay: 0``, there is no membrane, and c is the quantised input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tetdist.nn.neurons import NEURONS, NeuronConfig, integrate, option

if TYPE_CHECKING:
    from torch import Tensor


@NEURONS.register("ilif")
@dataclass(frozen=True, kw_only=True)
class ILIF(NeuronConfig):
    """Leaky integrate-and-fire with up to `most_spikes` spikes in a timestep, and a soft reset."""

    decay: float = option(
        0.25, "Fraction of the membrane kept for the next timestep; 0: no membrane.", ge=0, le=1
    )
    # Products of two numbers of spikes, as in attention, must fit into a byte.
    most_spikes: int = option(
        4, "Maximum number of spikes D of a neuron in a timestep.", ge=1, le=15
    )
    detach_reset: bool = option(
        False, "Treat the reset as a constant in the backward pass; I-LIF's paper does not."
    )

    @property
    def binary(self) -> bool:
        return False

    @property
    def has_kernels(self) -> bool:
        return type(self) in (ILIF, NILIF)

    @property
    def levels(self) -> int | None:
        return 1

    @property
    def highest(self) -> int:
        return self.most_spikes

    def run(
        self, current: Tensor, membrane: Tensor | None, **parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        from tetdist.nn.surrogates import Count

        def fire(u: Tensor) -> tuple[Tensor, Tensor]:
            count: Tensor = Count.apply(u / self.threshold, self.most_spikes)
            reset = self.threshold * (count.detach() if self.detach_reset else count)
            return self.sent(count), u - reset

        assert not parameters
        return integrate(current, membrane, self.decay, fire)

    def sent(self, counts: Tensor) -> Tensor:
        """Return the neurons' output for their numbers of spikes."""
        return counts


@NEURONS.register("nilif")
@dataclass(frozen=True, kw_only=True)
class NILIF(ILIF):
    """I-LIF that sends its number of spikes divided by the maximum D: 0, 1/D, ..., 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most_spikes & (self.most_spikes - 1):
            raise ValueError(
                f"most_spikes must be a power of 2 for nilif, not {self.most_spikes}: only then "
                "are sums of its spikes exact"
            )

    @property
    def levels(self) -> int | None:
        return self.most_spikes

    @property
    def highest(self) -> int:
        return 1

    def sent(self, counts: Tensor) -> Tensor:
        return counts / self.most_spikes
