"""Layers as the check of numerics runs them: by their kernels, and by the definition in float64."""

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.fast import dispatch
from tetdist.nn.integer_neurons import ILIF
from tetdist.nn.neurons import LIF, NEURONS, NeuronConfig, make
from tetdist.nn.norm_neuron import FusedLayer, Neuron, NeuronLayer, NormAdd, NormNeuron
from tetdist.nn.norm_pool import NormPool
from tetdist.nn.packed import carried, carry, pack
from tetdist.nn.parallel_neurons import SlidingPSN
from tetdist.nn.products import LinearAttention

# Other layers, by the name that a case gives in place of a kind of neuron.
NORM_ADD, NORM_POOL, ATTENTION = "norm and sum", "norm and pooling", "attention"


def kinds() -> dict[str, NeuronConfig | None]:
    """Return the kinds of neurons that have kernels, more LIF neurons, and layers without any."""
    found = {name: make({"kind": name}) for name in NEURONS}
    found |= {
        "lif, atan": LIF(decay=1.0, surrogate="atan", detach_reset=True, fires_at_threshold=True),
        "lif, soft": LIF(reset="soft", surrogate="sigmoid", fires_at_threshold=True),
        "lif, rectangle": LIF(reset="soft", surrogate="rectangle", detach_reset=True),
    }
    with_kernels = {name: one for name, one in found.items() if one.has_kernels}
    return {**with_kernels, NORM_ADD: None, NORM_POOL: None, ATTENTION: LIF()}


@dataclass(frozen=True)
class Case:
    """One layer and its inputs.

    Attributes:
        kind: One of `kinds`.
        timesteps: T.
        channels: C.
        dtype: Type of currents and spikes.
        mode: "training"; "carried": also with the membranes of an earlier segment; "evaluation".
        given: Inputs besides the current (`GIVEN`).
        batch, side: Number of images and their height and width.
    """

    kind: str
    timesteps: int
    channels: int
    dtype: torch.dtype
    mode: str
    given: str
    batch: int = 3
    side: int = 11

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self._named.items())

    @property
    def _named(self) -> dict[str, Any]:
        named = {"kind": self.kind, "T": self.timesteps, "C": self.channels}
        dtype = str(self.dtype).removeprefix("torch.")
        return named | {"type": dtype, "mode": self.mode, "given": self.given}

    def common(self, others: Iterable["Case"]) -> str:
        """Return what this case has in common with all others."""
        own = set(self._named.items()).intersection(*(one._named.items() for one in others))
        return ", ".join(f"{name} {value}" for name, value in sorted(own))


# Spikes of queries, keys and values.
QKV = ("q", "k", "v")
# "shared": one current, or shortcut, for all timesteps; "no norm": neurons alone.
# Only attention has integer spikes.
INTEGERS = "integer spikes"
GIVEN = ("current", "shared", "shortcut", "normalised shortcut", "spikes", "no norm")
FACTORS: dict[str, Sequence[Any]] = {
    "timesteps": (1, 3, 4, 8, 16),
    "channels": (3, 48, 64, 130),
    "mode": ("training", "carried", "evaluation"),
    "given": GIVEN,
}
# More numbers than float32 counts, 2^24: over all channels, and in each.
LARGE = (
    Case("lif", 4, 64, torch.bfloat16, "training", "normalised shortcut", batch=32, side=48),
    Case("lif", 1, 3, torch.bfloat16, "training", "current", batch=16, side=1025),
)
# Attention that a GPU's kernel computes with its neurons: QKFormer's for ImageNet and CIFAR, and
# sums beyond float16.
ATTENDED = tuple(
    Case(ATTENTION, timesteps, channels, dtype, mode, given, batch=1, side=side)
    for timesteps, channels, mode, given, side in (
        (4, 384, "training", "spikes", 14),
        (8, 240, "carried", "spikes", 8),
        (4, 64, "training", INTEGERS, 14),
    )
    for dtype in (torch.bfloat16, torch.float16)
)


def cases(dtypes: Sequence[torch.dtype]) -> list[Case]:
    """Return cases with all pairs of values of `FACTORS`, and of kinds with T, type and mode; and
    training in float32 with 130 channels.

    Kinds are not paired with channels and inputs, because a GPU needs a compilation for each case.
    """
    factors = {"kind": list(kinds()), "dtype": dtypes, **FACTORS}
    paired = [Case(**one) for one in pairwise(factors, {("kind", "channels"), ("kind", "given")})]
    # More channels than a block has; few pairs have float32, training and these together.
    blocks = [kind for kind in kinds() if kind in ("lif", NORM_ADD, NORM_POOL)]
    return paired + [Case(one, 4, 130, torch.float32, "training", "current") for one in blocks]


def pairwise(
    factors: Mapping[str, Sequence[Any]], unpaired: set[tuple[str, str]]
) -> Iterator[dict[str, Any]]:
    """Yield few combinations with all pairs of values of any two factors that are not unpaired."""
    both = [pair for pair in itertools.combinations(factors, 2) if pair not in unpaired]
    missing = {((a, x), (b, y)): None for a, b in both for x in factors[a] for y in factors[b]}

    def number_of(row: Mapping[str, Any]) -> int:
        chosen = [(name, row[name]) for name in factors if name in row]
        return sum(pair in missing for pair in itertools.combinations(chosen, 2))

    for number in itertools.count():
        if not missing:
            return
        row = dict(next(iter(missing)))
        for factor, values in factors.items():
            if factor not in row:
                # Of equally good values take another one each time.
                first = number % len(values)
                options = [{**row, factor: x} for x in (*values[first:], *values[:first])]
                row = max(options, key=number_of)
        for pair in itertools.combinations([(name, row[name]) for name in factors], 2):
            missing.pop(pair, None)
        yield row


# --- one case -------------------------------------------------------------------------------------


class Layer(nn.Module):
    """The layer of a case, and the norm of its shortcut, with random parameters and statistics."""

    def __init__(self, case: Case, generator: torch.Generator) -> None:
        super().__init__()
        config, channels = kinds()[case.kind], case.channels
        self.case = case
        self.norm = BatchNorm(channels) if case.given == "normalised shortcut" else None
        self.layer: nn.Module
        if config is not None and "timesteps" in (one.name for one in fields(config)):
            config = replace(config, timesteps=case.timesteps)  # type: ignore[call-arg]  # psn
        if isinstance(config, SlidingPSN):
            config = replace(config, order=2 + case.timesteps % 3)  # 2 to 4
        self.attention = None
        if case.kind == ATTENTION and config is not None:
            config = ILIF(most_spikes=15) if case.given == INTEGERS else config
            width = next(one for one in (64, 48, channels) if channels % one == 0)
            heads = channels // width
            # Currents near the threshold, and exact.
            scale = 2.0 ** -round(math.log2(width * case.side**2 * config.highest**2 / 8))
            self.attention = LinearAttention(heads, scale)
        self.config = config
        if config is None:
            self.layer = NormPool(channels) if case.kind == NORM_POOL else NormAdd(channels)
        elif case.given == "no norm" or case.kind == ATTENTION:
            self.layer = Neuron(config, channels)
        else:
            self.layer = NormNeuron(channels, config)
        with torch.no_grad():
            for name, value in [*self.named_parameters(), *self.named_buffers()]:
                if not name.endswith(("pending_mean", "pending_var")):
                    noise = torch.rand(value.shape, generator=generator)
                    value += noise - (0.5 if "var" not in name else 0.0)
        self.train(case.mode != "evaluation")
        self.carries = config is not None and config.segments and case.mode == "carried"

    def has_kernels(self, like: Tensor) -> bool:
        """Return whether kernels serve the layer for a tensor's type and device."""
        if self.case.kind == ATTENTION:
            return True  # of bytes, at least
        given = (like,), self.case.timesteps
        if self.config is None:
            return dispatch.norm_kernels_for(*given) is not None
        carries = self.carries
        return dispatch.kernels_for(self.config, *given, carries=carries, packs=False) is not None

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return spikes, or sums without neurons; also in bytes; and membranes at the end."""
        if isinstance(self.layer, NeuronLayer):
            self.layer.carries, self.layer.membrane = self.carries, inputs.get("membrane")
        match self.layer:
            case Neuron() if self.attention is not None:
                q, k, v = (inputs[name] for name in QKV)
                out = self.attention.fired(q, k, v, self.layer)
            case NormPool() | Neuron():
                out = self.layer(inputs["current"])
            case NormAdd():
                out = self.layer(inputs["current"], inputs["shortcut"], self.norm)
            case _:
                given = (inputs.get("shortcut"), inputs.get("spikes"), self.norm)
                out = self.layer(inputs["current"], self.case.timesteps, *given)
        packed = carried(out)
        found = {"spikes": out, "bytes": out if packed is None else packed.unpack(out.dtype)}
        if self.carries and isinstance(membrane := self.layer.membrane, Tensor):
            found["membrane"] = membrane
        return found


def drawn(layer: Layer, device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw the layer's inputs, channels last."""
    case = layer.case
    shape = (case.channels, case.side, case.side)

    def draw(*sizes: int, dtype: torch.dtype = case.dtype) -> Tensor:
        x = torch.randn(*sizes, *shape, generator=generator).to(device, dtype)
        rows = x.flatten(0, -4).contiguous(memory_format=torch.channels_last)
        return rows.unflatten(0, sizes)

    timesteps, batch = case.timesteps, case.batch

    def spikes() -> Tensor:
        # More than one of a neuron that sends more.
        most = layer.config.highest if layer.config and case.kind == ATTENTION else 1
        return (most * draw(timesteps, batch)).clamp(0, most).ceil()

    is_sum = case.kind == NORM_ADD
    shares = case.given == "shared" and case.kind != NORM_POOL
    found = {"current": draw(1 if shares and not is_sum else timesteps, batch)}
    if case.kind == ATTENTION:
        found = {name: spikes() for name in QKV}
    if "shortcut" in case.given or is_sum:
        found["shortcut"] = draw(1 if shares else timesteps, batch)
    if case.given == "spikes":
        found["spikes"] = spikes()
    if layer.config is not None and layer.carries:
        config = layer.config
        earlier = (config.order - 1,) if isinstance(config, SlidingPSN) else ()
        found["membrane"] = draw(*earlier, batch, dtype=torch.float32)
    return found


def results(layer: Layer, inputs: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return what a layer computes, all gradients, and its running statistics, in float64."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    for name in ("spikes", *QKV):
        if name in inputs and inputs[name].dtype == layer.case.dtype:
            carry(leaves[name], pack(inputs[name]))
    found = layer(leaves)
    generator = torch.Generator().manual_seed(seed)
    ends = [found[name] for name in ("spikes", "membrane") if name in found]
    gradients = [
        torch.randn(end.shape, generator=generator).to(layer.case.dtype).to(end) for end in ends
    ]
    torch.autograd.backward(ends, gradients)
    named = [*leaves.items(), *layer.named_parameters()]
    found |= {f"gradient of {name}": x.grad for name, x in named if x.grad is not None}
    found |= dict(layer.named_buffers())
    return {name: x.detach().double() for name, x in found.items()}


def difference(
    case: Case, device: torch.device, seed: int
) -> tuple[float, dict[str, float]] | None:
    """Compare the kernels with the definition in float64, from the same inputs.

    Returns:
        The fraction of differing spikes, and by name the root mean square of all other results'
        differences, relative to that of the results. Neurons with differing spikes do not count:
        both of their gradients are correct. None: there are no kernels.
    """
    torch.manual_seed(seed)  # of the initial weights
    generator = torch.Generator().manual_seed(seed)
    layer = Layer(case, generator).to(device)
    inputs = drawn(layer, device, generator)
    if not layer.has_kernels(next(iter(inputs.values()))):
        return None
    exact = copy.deepcopy(layer).double()
    if isinstance(exact.layer, FusedLayer):
        exact.layer.execution = "reference"
    wide = {name: x.double() for name, x in inputs.items()}
    ours, right = results(layer, inputs, seed), results(exact, wide, seed)
    spikes, same = 0.0, torch.ones((), device=device)
    if isinstance(layer.layer, NeuronLayer):
        differ = (ours["spikes"] != right["spikes"]) | (ours["bytes"] != right["bytes"])
        spikes = float(differ.double().mean())
        same = (~differ.any(0)).double()
        ours = {name: x for name, x in ours.items() if name not in ("spikes", "bytes")}
    return spikes, {name: _apart(x, right[name], same) for name, x in ours.items()}


def _apart(one: Tensor, other: Tensor, same: Tensor) -> float:
    counted = same if one.shape[-3:] == same.shape[-3:] else 1.0
    difference = ((one - other) * counted).square().mean().sqrt()
    return float(difference / other.square().mean().sqrt().clamp(min=1e-30))
