"""Check of numerics: the device's kernels compute the same as the plain definitions."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

import tetdist.models  # noqa: F401  # registers them
from tetdist.apps.check_gpu.check import Finding, Machine
from tetdist.apps.check_gpu.layers import ATTENDED, ATTENTION, LARGE, Case, cases, difference
from tetdist.losses import tet_loss
from tetdist.nn.fast.dispatch import kernels_for
from tetdist.nn.neurons import LIF
from tetdist.nn.precision import choose_algorithms, parameter_type

# Networks and their pixels: each kind of shortcut, parallel neurons, a transformer. On a CPU, the
# first has fewer pixels.
NETWORKS = {
    "sew_resnet18": 64,
    "spiking_resnet18": 64,
    "psn_sew_resnet18": 64,
    "qkformer_4_384_cifar": 32,
}
SMALL_NETWORKS = {"sew_resnet18": 32, "psn_sew_resnet18": 32, "sdt_2_256_cifar": 32}
BATCH, TIMESTEPS = 4, 4

# Whole networks are compared in float64, where no membrane is so close to the threshold that
# rounding decides. The limit is on the largest difference of logits and gradients, relative to the
# largest value.
NETWORK_LIMIT = 1e-9
# Layers are compared with the definition in float64, from the same inputs. In a network, a spike
# flipped by rounding changes everything after it, so correct kernels would differ as much as wrong
# ones. In a layer, correct kernels flip one spike in a million.
SPIKES_LIMIT = 2e-5
# Largest difference of a layer's other results, twice that of correct kernels, which round to the
# type once or twice.
LAYER_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 7e-4}
# Inputs that a layer is tried with: if a spike is flipped, the sums of its batch norm also change.
SEEDS = 3
MISSING = "fix the compiler that the warning names, or train without it (slower)"
REMEDY = "train with execution=reference, and report this with the JSON file"


def check_numerics(here: Machine) -> Finding:
    """Compare fused kernels with the plain definitions, both on the device."""
    current = torch.zeros(TIMESTEPS, BATCH, 64, device=here.device)
    if kernels_for(LIF(), (current,), TIMESTEPS, carries=False, packs=False) is None:
        # Both would be the plain definition, and thus equal.
        return Finding("bad", "the fused kernels do not work here (see the warning above)", MISSING)
    numbers: dict[str, Any] = {}
    wrong = _check_layers(here, numbers)
    for name, size in (SMALL_NETWORKS if here.small else NETWORKS).items():
        fused, reference = (_of_network(name, size, mode, here) for mode in _MODES)
        numbers[f"{name} fp64"] = worst = _largest(map(_distance, fused, reference))
        if not worst <= NETWORK_LIMIT and wrong is None:
            text = f"{name} in fp64: fused and reference differ by {worst:.2g}"
            wrong = f"{text} (limit {NETWORK_LIMIT:g})"
    if wrong is not None:
        return Finding("bad", wrong, REMEDY, numbers)
    text = ", ".join(f"{k} {x:.1g}" for k, x in numbers.items() if isinstance(x, float))
    left_out = len(numbers["layers_left_out"])
    also = f" ({left_out} left out: no kernels, or no memory)" if left_out else ""
    text = f"{numbers['layers']} layers{also}, fused = reference within {text}"
    return Finding("ok", text, None, numbers)


_MODES = ("fused", "reference")


def _check_layers(here: Machine, numbers: dict[str, Any]) -> str | None:
    """Compare layers, fill in `numbers`, and return what is wrong; None: nothing."""
    # The C++ kernels serve no float16.
    dtypes = [dtype for dtype in LAYER_LIMITS if here.on_gpu or dtype != torch.float16]
    layers = [*cases(dtypes), *((*LARGE, *ATTENDED) if here.on_gpu else ())]
    # Processes of a host share compiled kernels, so each begins elsewhere.
    first = here.world.rank * len(layers) // here.world.world_size
    wrong: dict[Case, str] = {}
    missing = []
    for case in (*layers[first:], *layers[:first]):
        try:
            found = compared(case, here.device)
        except torch.OutOfMemoryError:
            found = None
        if found is None:
            missing.append(str(case))
            continue
        dtype = str(case.dtype).removeprefix("torch.")
        numbers[dtype] = _largest([numbers.get(dtype, 0.0), found[0]])
        if found[1] is not None:
            wrong[case] = found[1]
    numbers |= {"layers": len(layers) - len(missing), "layers_left_out": missing}
    if not wrong:
        return None
    numbers["wrong_layers"] = {str(case): text for case, text in wrong.items()}
    first_wrong, text = next(iter(wrong.items()))
    described = f"{len(wrong)} of {len(layers)} layers are wrong"
    if common := first_wrong.common(wrong):
        described += f", all with {common}"
    return f"{described}: {first_wrong}: {text}"


def compared(case: Case, device: torch.device) -> tuple[float, str | None] | None:
    """Compare a layer's kernels with the definition.

    Returns:
        The largest difference, and a text if it is wrong. None: there are no kernels.
    """
    worst, text = 0.0, None
    for seed in range(SEEDS):
        found = difference(case, device, seed)
        if found is None:
            return None
        spikes, apart = found
        name = max(apart, key=lambda one: np.nan_to_num(apart[one], nan=np.inf))
        # Matrix units also round the factors of attention's gradients.
        limit = LAYER_LIMITS[case.dtype] * (4 if case.kind == ATTENTION else 1)
        worst = apart[name]
        if spikes <= SPIKES_LIMIT and worst <= limit:
            return worst, None
        text = f"{spikes:.2g} of the spikes differ (limit {SPIKES_LIMIT:g})"
        text += f", {name} by {worst:.2g} (limit {limit:g})"
    return worst, text


def _of_network(name: str, size: int, execution: str, here: Machine) -> list[Tensor]:
    """Return logits in float64, in training and evaluation, and the gradients of the first and the
    last weight."""
    choose_algorithms("fp64")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, timesteps=TIMESTEPS)
    model.set_execution(execution)
    model.to(here.device, parameter_type("fp64")).to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(BATCH, 3, size, size, generator=generator, dtype=torch.float64)
    images = images.to(here.device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(BATCH, device=here.device) % 10
    logits = model(images, per_timestep=True)
    tet_loss(logits, labels, lambda_=0.001).backward()
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    gradients = [w.grad for w in (weights[0], weights[-1]) if w.grad is not None]
    with torch.no_grad():
        return [logits.detach(), *gradients, model.eval()(images, per_timestep=True)]


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))


def _largest(distances: Iterable[float]) -> float:
    """Return the largest distance; NaN if one is NaN, which Python's max may ignore."""
    return float(np.max([*distances]))
