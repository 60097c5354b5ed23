"""Whether the device computes what the definitions say."""

from typing import Any

import timm
import torch
from torch import Tensor

import tetdist.models  # noqa: F401  # registers them
from tetdist.device_check.check import Finding, Machine
from tetdist.losses import tet_loss
from tetdist.nn.neurons import LIF
from tetdist.nn.norm_neuron import NormNeuron
from tetdist.nn.passes import passes_for
from tetdist.nn.precision import autocast, choose_algorithms, parameter_type

NETWORKS = ("sew_resnet18", "spiking_resnet18")
SIZE, BATCH, TIMESTEPS = 64, 4, 4

# Largest difference of a network's logits (in float64 also of gradients), as a share of the largest
# of them. In float64 no membrane comes so near the threshold that rounding decides; in float32 some
# may, and a spike more or less is seen in the logits.
LIMITS = {"fp64": 1e-9, "fp32": 0.05}
# In bfloat16 a whole network takes every rounding further, so one layer is compared: the share of
# its spikes that differ.
LAYER_LIMIT = 1e-3
MISSING = "make the compiler that the warning names work, or train, slower, without it"
REMEDY = "train with execution=reference, and report this with the JSON file"


def check_numerics(here: Machine) -> Finding:
    """Fused passes against the plain definitions, both on the device."""
    current = torch.zeros(TIMESTEPS, BATCH, 64, device=here.device)
    if passes_for(LIF(), (current,), TIMESTEPS, carries=False, packs=False) is None:
        # Both would be the definition, and equal.
        return Finding(
            "bad", "the fused passes do not work here; a warning above says why", MISSING
        )
    numbers: dict[str, Any] = {}
    for name in NETWORKS[:1] if here.small else NETWORKS:
        for precision, limit in LIMITS.items():
            fused, reference = (_outcome(name, mode, precision, here) for mode in _MODES)
            numbers[f"{name} {precision}"] = worst = max(map(_distance, fused, reference))
            if not worst <= limit:
                text = f"{name} in {precision}: fused and reference differ by {worst:.2g}"
                return Finding("bad", f"{text} (limit {limit:g})", REMEDY, numbers)
    numbers["spikes of a layer bf16"] = share = _differing_spikes(here)
    if not share <= LAYER_LIMIT:
        text = f"a layer in bf16: {share:.2%} of the spikes differ (limit {LAYER_LIMIT:.1%})"
        return Finding("bad", text, REMEDY, numbers)
    text = ", ".join(f"{key} {value:.1g}" for key, value in numbers.items())
    return Finding("ok", f"fused = reference within {text}", None, numbers)


_MODES = ("fused", "reference")


def _outcome(name: str, execution: str, precision: str, here: Machine) -> list[Tensor]:
    """The logits, and the gradients of the first and the last weight."""
    choose_algorithms(precision)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, timesteps=TIMESTEPS)
    model.set_execution(execution)
    dtype = parameter_type(precision)
    model.to(here.device, dtype).to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(BATCH, 3, SIZE, SIZE, generator=generator).to(here.device, dtype)
    labels = torch.arange(BATCH, device=here.device)
    with autocast(here.device, precision):
        logits = model(images.contiguous(memory_format=torch.channels_last), per_timestep=True)
    tet_loss(logits, labels, lambda_=0.001).backward()
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    if precision != "fp64":
        # One spike more or less changes the gradients of all layers before it.
        return [logits.detach().double()]
    return [logits.detach(), *(w.grad for w in (weights[0], weights[-1]) if w.grad is not None)]


def _differing_spikes(here: Machine) -> float:
    """The share of a layer's spikes that the two kinds of passes make otherwise of one current."""
    generator = torch.Generator().manual_seed(0)
    current = torch.randn(TIMESTEPS, 16, 64, 28, 28, generator=generator)
    rows = current.to(here.device, torch.bfloat16).flatten(0, 1)
    current = rows.contiguous(memory_format=torch.channels_last).unflatten(0, current.shape[:2])
    spikes = []
    for execution in _MODES:
        layer = NormNeuron(64, LIF()).to(here.device)
        layer.execution = execution
        spikes.append(layer(current, TIMESTEPS).float())
    return float((spikes[0] != spikes[1]).float().mean())


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))
