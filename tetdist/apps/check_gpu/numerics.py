"""Check of numerics: the device's kernels compute the same as the plain definitions."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from torch import Tensor

import tetdist.models  # noqa: F401  # registers them
from tetdist.apps.check_gpu.check import Finding, Machine
from tetdist.losses import tet_loss
from tetdist.nn.fast.dispatch import kernels_for
from tetdist.nn.neurons import LIF
from tetdist.nn.norm_neuron import NormNeuron
from tetdist.nn.precision import choose_algorithms, parameter_type

NETWORKS = ("sew_resnet18", "spiking_resnet18")
SIZE, BATCH, TIMESTEPS = 64, 4, 4
CHANNELS = 64

# Whole networks are compared in float64, where no membrane is so close to the threshold that
# rounding decides. The limit is on the largest difference of logits and gradients, relative to the
# largest value.
NETWORK_LIMIT = 1e-9


class LayerLimit(NamedTuple):
    """Largest allowed difference between a layer's two computations.

    Attributes:
        spikes: Fraction of differing spikes.
        gradients: Root mean square of the gradients' differences, relative to that of the
            gradients, over neurons with only equal spikes.
    """

    spikes: float
    gradients: float


# Limits for a single layer with one given current. In a network, a spike flipped by rounding
# changes everything after it, so correct kernels would differ as much as wrong ones. Correct ones
# differ by 1e-7 in float32 (at most one spike in a million), and by 7e-4 and 6e-3 in bfloat16; a
# decay of 0.45 instead of 0.5 gives 5e-3 and 0.1 in both.
LAYER_LIMITS = {
    torch.float32: LayerLimit(spikes=2e-5, gradients=1e-5),
    torch.bfloat16: LayerLimit(spikes=2e-3, gradients=0.02),
}
MISSING = "fix the compiler that the warning names, or train without it (slower)"
REMEDY = "train with execution=reference, and report this with the JSON file"


def check_numerics(here: Machine) -> Finding:
    """Compare fused kernels with the plain definitions, both on the device."""
    current = torch.zeros(TIMESTEPS, BATCH, CHANNELS, device=here.device)
    if kernels_for(LIF(), (current,), TIMESTEPS, carries=False, packs=False) is None:
        # Both would be the plain definition, and thus equal.
        return Finding("bad", "the fused kernels do not work here (see the warning above)", MISSING)
    numbers: dict[str, Any] = {}
    for name in NETWORKS[:1] if here.small else NETWORKS:
        fused, reference = (_of_network(name, mode, here) for mode in _MODES)
        numbers[f"{name} fp64"] = worst = _largest(map(_distance, fused, reference))
        if not worst <= NETWORK_LIMIT:
            text = f"{name} in fp64: fused and reference differ by {worst:.2g}"
            return Finding("bad", f"{text} (limit {NETWORK_LIMIT:g})", REMEDY, numbers)
    for dtype, limit in LAYER_LIMITS.items():
        name = str(dtype).removeprefix("torch.")
        apart = _layers_apart(dtype, here)
        numbers[f"spikes of a layer {name}"] = apart.spikes
        numbers[f"gradients of a layer {name}"] = apart.gradients
        if not (apart.spikes <= limit.spikes and apart.gradients <= limit.gradients):
            text = (
                f"a layer in {name}: {apart.spikes:.2g} of the spikes differ (limit "
                f"{limit.spikes:g}), gradients by {apart.gradients:.2g} (limit {limit.gradients:g})"
            )
            return Finding("bad", text, REMEDY, numbers)
    text = ", ".join(f"{key} {value:.1g}" for key, value in numbers.items())
    return Finding("ok", f"fused = reference within {text}", None, numbers)


_MODES = ("fused", "reference")


def _of_network(name: str, execution: str, here: Machine) -> list[Tensor]:
    """Return the logits in float64, and the gradients of the first and the last weight."""
    choose_algorithms("fp64")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, timesteps=TIMESTEPS)
    model.set_execution(execution)
    model.to(here.device, parameter_type("fp64")).to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(1)
    size = SIZE // 2 if here.small else SIZE
    images = torch.rand(BATCH, 3, size, size, generator=generator, dtype=torch.float64)
    images = images.to(here.device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(BATCH, device=here.device) % 10
    logits = model(images, per_timestep=True)
    tet_loss(logits, labels, lambda_=0.001).backward()
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    return [logits.detach(), *(w.grad for w in (weights[0], weights[-1]) if w.grad is not None)]


def _layers_apart(dtype: torch.dtype, here: Machine, seed: int = 0) -> LayerLimit:
    """Return the difference between a layer's fused and plain computation from the same current."""
    (fused, fused_gradients), (plain, gradients) = (
        _of_layer(mode, dtype, here, seed) for mode in _MODES
    )
    differ = fused != plain
    # Neurons with differing spikes have differing gradients, both of which are correct.
    same = ~differ.any(0)
    apart = [
        float(((one - other) * same).square().mean().sqrt() / other.square().mean().sqrt())
        for one, other in zip(fused_gradients, gradients, strict=True)
    ]
    return LayerLimit(float(differ.double().mean()), _largest(apart))


def _of_layer(
    execution: str, dtype: torch.dtype, here: Machine, seed: int
) -> tuple[Tensor, list[Tensor]]:
    """Return a layer's spikes, and the gradients of its current and shortcut, in float64."""
    generator = torch.Generator().manual_seed(seed)
    side = 8 if here.small else 28

    def random() -> Tensor:
        numbers = torch.randn(TIMESTEPS, 16, CHANNELS, side, side, generator=generator)
        rows = numbers.to(here.device, dtype).flatten(0, 1)
        return rows.contiguous(memory_format=torch.channels_last).unflatten(0, numbers.shape[:2])

    current, shortcut, gradient = random().requires_grad_(), random().requires_grad_(), random()
    layer = NormNeuron(CHANNELS, LIF())
    with torch.no_grad():
        layer.norm.weight.copy_(0.5 + torch.rand(CHANNELS, generator=generator))
        layer.norm.bias.copy_(0.3 * torch.randn(CHANNELS, generator=generator))
    layer.to(here.device)
    layer.execution = execution
    spikes = layer(current, TIMESTEPS, shortcut)
    spikes.backward(gradient)
    gradients = [x.grad.double() for x in (current, shortcut) if x.grad is not None]
    return spikes.detach(), gradients


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))


def _largest(distances: Iterable[float]) -> float:
    """Return the largest distance; NaN if one is NaN, which Python's max may ignore."""
    return float(np.max([*distances]))
