"""Integer spikes as a device runs them: each timestep as sub-timesteps of spikes that are 0 or 1.

A neuron that sends a number n in a timestep (I-LIF; NI-LIF sends n / D) fires in n of its D
sub-timesteps, and the next layer of synapses adds its weights at each of these. Here it fires in
the first n, so that max-pooling each sub-timestep gives the same as max-pooling n. Sums of spikes
(SEW's ADD) take more sub-timesteps; so do means over 2x2 pixels, whose spikes weigh a quarter. A
bias is added once a timestep, and norm and neurons come after the sum. The currents equal those of
the numbers themselves up to rounding.

Self-attention sums products of three neurons' spikes: each pair of sub-timesteps of keys and values
adds its k^T v, and each sub-timestep of the queries selects from the sums. Other products of
spikes, including masks, are computed with the numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tetdist.errors import UserError
from tetdist.nn.norm_neuron import LatestLevels, neurons_of
from tetdist.nn.products import LinearAttention


class _Layer:
    """A convolution or linear layer that sees only spikes of 0 and 1 and adds up its results.

    Args:
        latest: The neurons before it. Its inputs are spikes if they are multiples of one neuron's
            output value, or means of four.
    """

    def __init__(self, module: nn.Conv2d | nn.Linear, latest: LatestLevels) -> None:
        self.module, self.latest = module, latest
        self.levels = 1  # of the present input
        self.most = 0  # of spikes in one timestep
        self.sub_timesteps: int | None = None
        self.handles = (
            module.register_forward_pre_hook(self._before),
            module.register_forward_hook(self._after),
        )

    def _before(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Replace an input (T, ...) of numbers by one of spikes, (T * sub-timesteps, ...)."""
        (x,) = inputs
        self.sub_timesteps = None
        one = self.latest.levels or 1
        fitting = [n for n in (one, 4 * one) if torch.equal(x * n, (x * n).round().abs())]
        if not fitting:  # For example a mean over many pixels, which is multiplied as usual.
            return None
        self.levels = fitting[0]
        slots = _slots(x, self.levels)
        self.sub_timesteps = len(slots)
        self.most = max(self.most, self.sub_timesteps)
        return (torch.stack(slots, 1).flatten(0, 1),)

    def _after(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        if self.sub_timesteps is None:
            return None
        total = output.unflatten(0, (-1, self.sub_timesteps)).sum(1)
        bias: Tensor | None = self.module.bias
        if bias is None:
            return total / self.levels
        if isinstance(self.module, nn.Conv2d):
            bias = bias.view(-1, 1, 1)
        return (total - self.sub_timesteps * bias) / self.levels + bias


def _slots(x: Tensor, levels: int) -> list[Tensor]:
    """Return the spikes of each sub-timestep for numbers of spikes over ``levels``."""
    counts = x * levels
    return [(counts > sub).to(x.dtype) for sub in range(max(int(counts.max()), 1))]


def _attention(attention: LinearAttention, latest: LatestLevels) -> Callable[..., Tensor]:
    """Make a replacement for a `LinearAttention`'s definition that sees only spikes of 0 and 1."""
    of_spikes = attention.of

    def of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        levels = latest.levels or 1
        keys, values = _slots(k, levels), _slots(v, levels)
        # Pairs act as additional positions, over which k^T v is summed.
        k_pairs = torch.cat([one for one in keys for _ in values], 3)
        v_pairs = torch.cat([one for _ in keys for one in values], 3)
        selected = [of_spikes(one, k_pairs, v_pairs) for one in _slots(q, levels)]
        return torch.stack(selected).sum(0) / levels**3

    return of


@contextmanager
def unrolled(model: nn.Module) -> Iterator[dict[str, int]]:
    """Make layers of synapses see only spikes of 0 and 1, one sub-timestep after another.

    The first layer sees the network's unchanged input.

    Yields:
        Maximum number of sub-timesteps in a timestep, by layer, without layers whose inputs were
        real numbers; filled at the end.
    """
    neurons = neurons_of(model)
    if not neurons or any(neuron.levels is None for neuron in neurons):
        raise UserError(
            "--unroll needs a network in which all neurons are tetdist's and send spikes; remove "
            "the option"
        )
    latest = LatestLevels(model)
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    layers = {name: _Layer(module, latest) for name, module in list(found.items())[1:]}
    attentions = [module for module in model.modules() if isinstance(module, LinearAttention)]
    for attention in attentions:
        attention.of = _attention(attention, latest)  # type: ignore[method-assign]  # until the end
    most: dict[str, int] = {}
    try:
        yield most
    finally:
        latest.remove()
        for attention in attentions:
            del attention.of
        for name, layer in layers.items():
            for handle in layer.handles:
                handle.remove()
            if layer.most:
                most[name] = layer.most
