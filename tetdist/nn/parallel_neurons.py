"""Parallel spiking neurons (PSN, Fang et al., NeurIPS 2023): all timesteps at once, without reset.

A neuron fires at a learnt weighted sum of its currents, with weights shared by the layer:

    H[t] = sum over s of A[t, s] I[s], plus b[t]
    s[t] = 1 if H[t] >= 0 else 0

    psn            A is any (T, T) and b any (T,): a spike depends on later currents, too
    masked_psn     A[t, s] is 0 unless t - order < s <= t: a spike depends on the last `order`
                   currents
    sliding_psn    A[t, s] = w[order - 1 - (t - s)] for those, and one b: any number of timesteps

b starts at -threshold. Default values and initial weights are those of the authors' code. There the
mask rises from 0 to 1 in a training's first epochs; here it is always 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from tetdist.nn.neurons import (
    NEURONS,
    NeuronConfig,
    SurrogateName,
    kind_of,
    option,
    step,
    widened,
)
from tetdist.wording import counted

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ParallelNeuron(NeuronConfig):
    """Base of the three kinds of parallel neurons."""

    over_time: ClassVar[frozenset[str]] = frozenset({"weight", "bias"})
    segments: ClassVar[bool] = False

    surrogate: SurrogateName = option("atan", "Surrogate derivative of the spike.")
    surrogate_width: float = option(2.0, "Surrogate's half-width or steepness.", gt=0)

    @property
    def has_kernels(self) -> bool:
        return type(self) in (PSN, MaskedPSN, SlidingPSN)

    def for_kernels(self, timesteps: int, **parameters: Tensor) -> tuple[Tensor, ...]:
        weight, bias = self.sums_over_time(timesteps, **parameters)
        return weight, bias.contiguous()

    def sums_over_time(self, timesteps: int, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's A, (T, T), and b, (T,), from its parameters."""
        raise NotImplementedError  # Each of the three kinds has its own.

    def run(
        self, current: Tensor, membrane: Tensor | None, **parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        from tetdist.nn.precision import exact

        assert membrane is None, "it would have to know all earlier currents"
        wide = widened(current)
        parameters = {name: value.to(wide.dtype) for name, value in parameters.items()}
        weight, bias = self.sums_over_time(len(current), **parameters)
        with exact(current):
            h = bias[:, None].addmm(weight, wide.flatten(1))
        spikes = self.fired(h.view(current.shape)).to(current.dtype)
        return spikes, current.new_zeros(current.shape[1:])

    def fired(self, h: Tensor) -> Tensor:
        """Return the spikes of H, with the surrogate's gradient."""
        return step(h, self.surrogate, self.surrogate_width, at_threshold=True)


@NEURONS.register("psn")
@dataclass(frozen=True, kw_only=True)
class PSN(ParallelNeuron):
    """The parallel spiking neuron: each timestep's spikes depend on all timesteps' currents."""

    causal: ClassVar[bool] = False

    timesteps: int = option(
        4,
        "Number of timesteps T that the learnt weights combine; phases.N.timesteps must be equal "
        "(for masked_psn: at most equal).",
        ge=1,
        le=10_000,
    )

    def parameters(self, num_channels: int) -> dict[str, Tensor]:
        import torch

        del num_channels
        weight = torch.empty(self.timesteps, self.timesteps)
        torch.nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        return {"weight": weight, "bias": torch.full((self.timesteps,), -self.threshold)}

    def refusal(self, timesteps: int) -> str | None:
        if timesteps == self.timesteps or (self.causal and timesteps < self.timesteps):
            return None
        return (
            f"{kind_of(self)} cannot run {counted(timesteps, 'timestep')}: it has weights for T="
            f"{self.timesteps} only"
        )

    def sums_over_time(self, timesteps: int, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        assert timesteps == self.timesteps
        return weight, bias


@NEURONS.register("masked_psn")
@dataclass(frozen=True, kw_only=True)
class MaskedPSN(PSN):
    """The parallel spiking neuron of which a spike depends on the last `order` currents."""

    causal: ClassVar[bool] = True

    order: int = option(
        2,
        "Number of timesteps that a spike depends on: its own and the ones before it.",
        ge=1,
        le=10_000,
    )

    def sums_over_time(self, timesteps: int, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        assert self.refusal(timesteps) is None
        weight, bias = weight[:timesteps, :timesteps], bias[:timesteps]
        ones = weight.new_ones(weight.shape)
        return weight * ones.tril() * ones.triu(1 - self.order), bias


@NEURONS.register("sliding_psn")
@dataclass(frozen=True, kw_only=True)
class SlidingPSN(ParallelNeuron):
    """The parallel spiking neuron with the same weights of the last `order` currents at all t."""

    segments: ClassVar[bool] = True
    sample_axis: ClassVar[int] = 1

    order: int = option(2, "Number of timesteps that a spike depends on.", ge=1, le=10_000)
    init: Literal["exponential", "uniform"] = option(
        "exponential",
        "Initial weights. exponential: 1 for the present current, 1/2 for the one before it, and "
        "so on; uniform: random, between -1/sqrt(order) and 1/sqrt(order).",
    )

    def parameters(self, num_channels: int) -> dict[str, Tensor]:
        import torch

        del num_channels
        weight = 0.5 ** torch.arange(self.order - 1, -1, -1, dtype=torch.float32)
        if self.init == "uniform":
            torch.nn.init.kaiming_uniform_(weight[None], a=math.sqrt(5))
        return {"weight": weight, "bias": torch.tensor(-self.threshold)}

    def sums_over_time(self, timesteps: int, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return A, (T, order - 1 + T), whose columns begin with the currents before a segment."""
        import torch

        ones = weight.new_ones(timesteps, self.order - 1 + timesteps)
        diagonals = [ones.tril(i) * ones.triu(i) for i in range(self.order)]
        return (weight[:, None, None] * torch.stack(diagonals)).sum(0), bias.expand(timesteps)

    def run(
        self, current: Tensor, membrane: Tensor | None, **parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run the neurons over time. The next segment starts from the last currents, (order - 1,
        ...)."""
        import torch

        wide = widened(current)
        weight, bias = (parameters[name].to(wide.dtype) for name in ("weight", "bias"))
        if membrane is None:
            membrane = wide.new_zeros((self.order - 1, *current.shape[1:]))
        present = torch.cat([membrane, wide])
        timesteps = len(current)
        h = sum(weight[i] * present[i : i + timesteps] for i in range(self.order)) + bias
        return self.fired(h).to(current.dtype), present[timesteps:]
