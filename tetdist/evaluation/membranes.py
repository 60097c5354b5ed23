"""Distribution of a network's membranes relative to their thresholds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tetdist.nn import neurons
from tetdist.nn.integer_neurons import ILIF, NILIF
from tetdist.nn.learned_decay import PLIF
from tetdist.nn.neurons import LIF
from tetdist.nn.norm_neuron import NormNeuron, spiking_layers
from tetdist.nn.precision import autocast

LOWEST, HIGHEST, BINS = -3.0, 3.0, 120  # in thresholds; 1 is a border between bins


@dataclass(frozen=True)
class Membranes:
    """Distributions over the neurons, timesteps and samples of a batch.

    Attributes:
        edges: Borders of the bins, in thresholds; the outermost bins include all values beyond.
        fractions: Fraction of membranes (before the reset) in each bin, by layer.
        fires: Firing rate of each layer: the fraction of membranes that fire.
    """

    edges: list[float]
    fractions: dict[str, list[float]]
    fires: dict[str, float]


@torch.no_grad()
def membrane_distribution(model: nn.Module, images: Tensor, precision: str) -> Membranes:
    """Run one batch by the neurons' definition, in evaluation mode; return their membranes.

    Args:
        model: The network, called with ``per_timestep=True``; its mode is restored.
    """
    fractions: dict[str, list[float]] = {}
    fires: dict[str, float] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            if isinstance(module, NormNeuron):
                named = {key: value for key, value in named.items() if key != "identity"}
                current = module.input_current(*arguments, **named)
            else:
                current, *timesteps = arguments  # T is given where one current serves all timesteps
                current = current.expand(*timesteps or current.shape[:1], *current.shape[1:])
            config = module.neuron
            assert isinstance(config, (LIF, ILIF))
            learned = neurons.broadcasting(config, module.learned, 2 if current.ndim == 5 else 0)
            fractions[name], fires[name] = _histogram(current, config, learned)

        return hook

    handles = [
        module.register_forward_pre_hook(look(name), with_kwargs=True)
        for name, module in spiking_layers(model).items()
        # Other kinds have no membrane, or change it by parameters of their own.
        if type(module.neuron) in (LIF, PLIF, ILIF, NILIF)
    ]
    was_training = model.training
    model.eval()
    try:
        with autocast(images.device, precision):
            model(images, per_timestep=True)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    edges = torch.linspace(LOWEST, HIGHEST, BINS + 1, dtype=torch.float64).tolist()
    return Membranes(edges, fractions, fires)


def _counts(u: Tensor) -> Tensor:
    """Count the values from `LOWEST` to `HIGHEST` in each bin, (BINS,), and no NaN.

    torch.histc does this, but is not deterministic on a GPU.
    """
    bins = ((u - LOWEST) * BINS / (HIGHEST - LOWEST)).clamp(max=BINS - 1)
    return torch.bincount(bins.nan_to_num(nan=BINS).long().flatten(), minlength=BINS + 1)[:BINS]


def _histogram(
    current: Tensor, config: LIF | ILIF, learned: dict[str, Tensor]
) -> tuple[list[float], float]:
    """Return the fractions by bin and the firing rate of neurons with input current (T, ...)."""
    current = current.to(torch.promote_types(current.dtype, torch.float32))
    counts = torch.zeros(BINS, dtype=torch.float64, device=current.device)
    fired = torch.zeros((), dtype=torch.float64, device=current.device)
    rest = torch.zeros_like(current[0])
    decay: Tensor | float = config.decay
    scaled = current
    if isinstance(config, PLIF):
        share = learned["w"].sigmoid()
        decay, scaled = 1 - share, current * share if config.decay_input else current
    for current_t, scaled_t in zip(current, scaled, strict=True):
        u = (decay * rest + scaled_t) / config.threshold
        counts += _counts(u.clamp(LOWEST, HIGHEST))
        spikes, rest = config.run(current_t[None], rest, **learned)
        fired += spikes.sum(dtype=torch.float64) / config.highest
    fractions: list[float] = (counts / current.numel()).tolist()
    return fractions, float(fired / current.numel())
