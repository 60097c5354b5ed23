"""Check of numerics: layers compute by the device's kernels what they do by definition in float64.

A network's spike that rounding flips changes everything after it, so that right and wrong kernels
would differ as much. In a layer right kernels flip one spike in a million.
"""

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tetdist.apps.check_gpu.check import Finding, Machine
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.fast.dispatch import kernels_for
from tetdist.nn.integer_neurons import ILIF
from tetdist.nn.neurons import LIF, NEURONS, NeuronConfig, make
from tetdist.nn.norm_neuron import Neuron, NeuronLayer, NormAdd, NormNeuron, carrying_membranes
from tetdist.nn.norm_pool import NormPool
from tetdist.nn.packed import pack, packed_of, with_packed
from tetdist.nn.parallel_neurons import PSN, SlidingPSN
from tetdist.nn.precision import choose_algorithms
from tetdist.nn.products import LinearAttention

# Largest fraction of spikes that differ.
SPIKES_LIMIT = 2e-5
# Largest difference of a layer's other results, twice that of correct kernels, which round to the
# type once or twice.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 7e-4}
# Inputs that a layer is tried with: if a spike is flipped, the sums of its batch norm also change.
SEEDS = 3
# Largest difference of a float32 convolution and its gradients: TF32's is thirty times as large.
CONVOLUTION_LIMIT = 1e-5
NOT_FLOAT32 = "unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, or report this with the JSON file"
MISSING = "fix the compiler that the warning names, or train without it (slower)"
REMEDY = "train with execution=reference, and report this with the JSON file"
# Other layers, by the name that a case gives in place of a kind of neuron.
NORM_ADD, NORM_POOL, ATTENTION = "norm and sum", "norm and pooling", "attention"


def kinds() -> dict[str, NeuronConfig | None]:
    """Return the kinds of neurons that have kernels, more LIF neurons, and layers without any."""
    neurons = {name: make({"kind": name}) for name in NEURONS}
    neurons |= {
        "lif, atan": LIF(decay=1.0, surrogate="atan", detach_reset=True, fires_at_threshold=True),
        "lif, soft": LIF(reset="soft", surrogate="sigmoid", fires_at_threshold=True),
        "lif, rectangle": LIF(reset="soft", surrogate="rectangle", detach_reset=True),
    }
    with_kernels = {name: one for name, one in neurons.items() if one.has_kernels}
    return {**with_kernels, NORM_ADD: None, NORM_POOL: None, ATTENTION: LIF()}


class Case(NamedTuple):
    """One layer, of one of `kinds`, and its inputs: images of a type, and others (`GIVEN`)."""

    kind: str
    timesteps: int
    channels: int
    dtype: torch.dtype
    mode: str
    given: str
    batch: int = 3
    side: int = 11


TIMESTEPS, CHANNELS = (1, 3, 4, 8, 16), (3, 48, 64, 130)
# "carried": training with the membranes of an earlier segment.
MODES = ("training", "carried", "evaluation")
# "shared": one current, or shortcut, for all timesteps; "no norm": neurons alone.
GIVEN = ("current", "shared", "shortcut", "normalised shortcut", "spikes", "no norm")
INTEGERS = "integer spikes"  # only of attention
QKV = ("q", "k", "v")
# More numbers than float32 counts, 2^24: over all channels, and in each. And attention that a GPU's
# kernel computes with its neurons: QKFormer's for ImageNet and CIFAR, and sums beyond float16.
BF16, FP16 = torch.bfloat16, torch.float16
ON_GPU = (
    Case("lif", 4, 64, BF16, "training", "normalised shortcut", batch=32, side=48),
    Case("lif", 1, 3, BF16, "training", "current", batch=16, side=1025),
    *(Case(ATTENTION, 4, 384, one, "training", "spikes", 1, 14) for one in (BF16, FP16)),
    *(Case(ATTENTION, 8, 240, one, "carried", "spikes", 1, 8) for one in (BF16, FP16)),
    *(Case(ATTENTION, 4, 64, one, "training", INTEGERS, 1, 14) for one in (BF16, FP16)),
)


def cases(dtypes: Sequence[torch.dtype]) -> list[Case]:
    """Return cases with all pairs of T, channels, type, mode and given, and of kinds with T, type
    and mode; and training in float32 with more channels than a block of kernels has.

    Kinds are not paired with channels and given, because a GPU needs a compilation for each case.
    """
    numbered = itertools.product(enumerate(kinds()), enumerate(TIMESTEPS))
    dealt = [
        Case(
            kind,
            timesteps,
            CHANNELS[(k // 4 + t) % len(CHANNELS)],
            dtypes[(k // 3 + t) % len(dtypes)],
            MODES[(k + 2 * t) % len(MODES)],
            GIVEN[(k + t) % len(GIVEN)],
        )
        for (k, kind), (t, timesteps) in numbered
    ]
    blocks = ("lif", NORM_ADD, NORM_POOL)
    return dealt + [Case(one, 4, 130, torch.float32, "training", "current") for one in blocks]


class Layer(nn.Module):
    """The layer of a case, and the norm of its shortcut, with random parameters and statistics."""

    def __init__(self, case: Case, generator: torch.Generator) -> None:
        super().__init__()
        self.case, channels, config = case, case.channels, kinds()[case.kind]
        self.norm = BatchNorm(channels) if case.given == "normalised shortcut" else None
        if isinstance(config, PSN):
            config = replace(config, timesteps=case.timesteps)
        if isinstance(config, SlidingPSN):
            config = replace(config, order=2 + case.timesteps % 3)  # 2 to 4
        if case.given == INTEGERS:
            config = ILIF(most_spikes=15)
        self.config = config
        self.carries = config is not None and config.segments and case.mode == "carried"
        if config is None:
            self.layer: Any = NormPool(channels) if case.kind == NORM_POOL else NormAdd(channels)
        elif case.kind == ATTENTION:
            self.layer = Neuron(config, channels)
            width = next(one for one in (64, 48, channels) if channels % one == 0)
            # Currents near the threshold, and exact.
            scale = 2.0 ** -round(math.log2(width * case.side**2 * config.highest**2 / 8))
            self.attention = LinearAttention(channels // width, scale)
        elif case.given == "no norm":
            self.layer = Neuron(config, channels)
        else:
            self.layer = NormNeuron(channels, config)
        with torch.no_grad():
            for name, value in [*self.named_parameters(), *self.named_buffers()]:
                if not name.endswith(("pending_mean", "pending_var")):
                    noise = torch.rand(value.shape, generator=generator)
                    value += noise - (0.5 if "var" not in name else 0.0)
        self.train(case.mode != "evaluation")

    def draw(self, device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the inputs, and a shortcut in any case, channels last."""
        case, config, batch = self.case, self.config, self.case.batch

        def normal(*sizes: int, dtype: torch.dtype = case.dtype) -> Tensor:
            x = torch.randn(*sizes, case.channels, case.side, case.side, generator=generator)
            rows = x.to(device, dtype).flatten(0, -4).contiguous(memory_format=torch.channels_last)
            return rows.unflatten(0, sizes)

        of = 1 if case.given == "shared" else case.timesteps
        inputs = {"current": normal(of if config else case.timesteps, batch)}
        inputs["shortcut"] = normal(of, batch)
        # More than one spike of a neuron that sends more.
        most = config.highest if config and case.kind == ATTENTION else 1
        for name in QKV if case.kind == ATTENTION else ("spikes",):
            inputs[name] = (most * normal(case.timesteps, batch)).clamp(0, most).ceil()
        if self.carries:
            earlier = (config.order - 1,) if isinstance(config, SlidingPSN) else ()
            inputs["membrane"] = normal(*earlier, batch, dtype=torch.float32)
        return inputs

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return spikes, or sums without neurons; also in bytes; and membranes at the end."""
        carried_by = [self.layer] if self.carries else []
        starts = [inputs["membrane"]] if self.carries else None
        with carrying_membranes(carried_by, starts) as ends:
            outputs = self._outputs(inputs)
            return outputs | ({"membrane": ends()[0]} if self.carries else {})

    def _outputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        current, shortcut, form = inputs["current"], inputs["shortcut"], self.case.given
        if self.case.kind == ATTENTION:
            q, k, v = (inputs[name] for name in QKV)
            out = self.attention.fired(q, k, v, self.layer)
        elif self.case.kind == NORM_ADD:
            out = self.layer(current, shortcut, self.norm)
        elif isinstance(self.layer, NormNeuron):
            added = shortcut if "shortcut" in form else None
            spikes = inputs["spikes"] if form == "spikes" else None
            out = self.layer(current, self.case.timesteps, added, spikes, self.norm)
        else:
            out = self.layer(current)
        packed = packed_of(out)
        return {"spikes": out, "bytes": out if packed is None else packed.unpack(out.dtype)}


def check_numerics(here: Machine) -> Finding:
    """Compare layers by their kernels with the definition."""
    current = torch.zeros(4, 2, 64, device=here.world.device)
    if kernels_for(LIF(), (current,), 4, carries=False, packs=False) is None:
        # Both would be the plain definition.
        return Finding("bad", "the fused kernels do not work here (see the warning above)", MISSING)
    if not (apart := convolution_apart(here.world.device)) <= CONVOLUTION_LIMIT:
        text = f"a convolution with precision=fp32 differs from float64's by {apart:.2g}"
        return Finding("bad", f"{text} (limit {CONVOLUTION_LIMIT:g})", NOT_FLOAT32)
    # The C++ kernels serve no float16.
    layers = [*cases([*LIMITS]), *ON_GPU] if here.on_gpu else cases([*LIMITS][:2])
    # Processes of a host share compiled kernels, so each begins elsewhere.
    first = here.world.rank * len(layers) // here.world.world_size
    deviations: dict[str, float] = {}
    wrong = []
    for case in (*layers[first:], *layers[:first]):
        here.progress(str(case))
        name, deviations[str(case)] = compared(case, here.world.device)
        if not deviations[str(case)] <= 1:
            wrong.append(f"{case}: {name} differs by {deviations[str(case)]:.3g} times the limit")
    if wrong:
        text = f"{len(wrong)} of {len(layers)} layers are wrong: {wrong[0]}"
        return Finding("bad", text, REMEDY, {"wrong_layers": wrong})
    furthest = max(deviations.values())
    text = f"{len(layers)} layers are as defined, within {furthest:.2f} of the limits"
    return Finding("ok", text, None, {"of_limits": deviations})


def convolution_apart(device: torch.device) -> float:
    """Return the largest difference of a convolution, or of its gradients, with precision=fp32 from
    float64, relative to its size."""
    choose_algorithms("fp32")
    generator = torch.Generator().manual_seed(0)
    sizes = ((8, 64, 14, 14), (64, 64, 3, 3))
    drawn = [torch.randn(one, generator=generator).to(device) for one in sizes]
    computed = []
    for dtype in (torch.float32, torch.float64):
        images, weight = (x.to(dtype, copy=True).requires_grad_() for x in drawn)
        out = F.conv2d(images, weight, padding=1)
        gradients = torch.autograd.grad(out.square().sum(), (images, weight))
        computed.append([x.detach().double() for x in (out, *gradients)])
    pairs = zip(*computed, strict=True)
    return max(float((ours - right).norm() / right.norm()) for ours, right in pairs)


def compared(case: Case, device: torch.device) -> tuple[str, float]:
    """Return the result that differs most from the definition, and by how much of the limit."""
    for seed in range(SEEDS):
        apart = differences(case, device, seed)
        name = max(apart, key=lambda one: np.nan_to_num(apart[one], nan=np.inf))
        if apart[name] <= 1:
            break
    return name, apart[name]


def differences(case: Case, device: torch.device, seed: int) -> dict[str, float]:
    """Compare the kernels with the definition in float64, from the same inputs.

    Returns:
        The fraction of differing spikes, and the root mean square of each other result's
        difference relative to that of the result; by name, and divided by the limits. Neurons with
        differing spikes do not count in the others: both of their gradients are correct.
    """
    torch.manual_seed(seed)  # of the initial weights
    generator = torch.Generator().manual_seed(seed)
    layer = Layer(case, generator).to(device)
    inputs = layer.draw(device, generator)
    exact = copy.deepcopy(layer).double()
    exact.layer.execution = "reference"
    wide = {name: x.double() for name, x in inputs.items()}
    ours, right = results(layer, inputs, seed), results(exact, wide, seed)
    deviations, same = {}, torch.ones((), device=device)
    if isinstance(layer.layer, NeuronLayer):
        differ = (ours.pop("spikes") != right["spikes"]) | (ours.pop("bytes") != right["bytes"])
        deviations["spikes"] = float(differ.double().mean()) / SPIKES_LIMIT
        same = (~differ.any(0)).double()
    # Matrix units also round the factors of attention's gradients.
    limit = LIMITS[case.dtype] * (4 if case.kind == ATTENTION else 1)
    for name, x in ours.items():
        counted = same if x.shape[-3:] == same.shape[-3:] else 1.0
        square = ((x - right[name]) * counted).square().mean()
        size = right[name].square().mean().sqrt().clamp(min=1e-30)
        deviations[name] = float(square.sqrt() / size) / limit
    return deviations


def results(layer: Layer, inputs: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return what a layer computes, all gradients, and its running statistics, in float64."""
    leaves, dtype = {k: x.clone().requires_grad_() for k, x in inputs.items()}, layer.case.dtype
    for name in ("spikes", *QKV):
        if name in inputs and inputs[name].dtype == dtype:
            with_packed(leaves[name], pack(inputs[name]))
    results: dict[str, Any] = layer(leaves)
    generator = torch.Generator().manual_seed(seed)
    ends = [results[name] for name in ("spikes", "membrane") if name in results]
    gradients = [torch.randn(x.shape, generator=generator).to(dtype).to(x) for x in ends]
    torch.autograd.backward(ends, gradients)
    named = itertools.chain(leaves.items(), layer.named_parameters())
    results |= {f"gradient of {name}": x.grad for name, x in named if x.grad is not None}
    results |= dict(layer.named_buffers())
    return {name: x.detach().double() for name, x in results.items()}
