"""The conversion of a trained network to integers; integer_network.py defines what they compute.

The conversion proves the range of every sum and membrane from the weights alone. A range that does
not fit is an error, so nothing overflows for any input.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tetdist.apps.weights.integer_network import MEMBRANE_BITS, STREAM_BITS, IntegerNetwork
from tetdist.apps.weights.structure import Traversal, folded, pooled
from tetdist.apps.weights.trained import Trained
from tetdist.models import (
    VGGSNN,
    MSResNet,
    PSNSEWResNet,
    SEWResNet,
    SpikingConvNet,
    SpikingNetwork,
    SpikingResNet,
)
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.integer_neurons import ILIF, NILIF
from tetdist.nn.learned_decay import PLIF
from tetdist.nn.neurons import LIF, kind_of
from tetdist.nn.norm_neuron import NeuronLayer
from tetdist.nn.packed import MaxPool

# Largest whole weight. Without VNNI, processors add two products of a byte and a weight in 16 bits,
# so weights of inputs above 127 are smaller.
_MOST, _MOST_OF_BYTES = 127, 63
_SUM, _STREAM = 2**31 - 1, 2**15 - 1  # int32 and int16
_DECAY_BITS, _FRACTION_BITS = 12, 8
_COARSEST = 2**20  # units of a threshold or bias at most


@dataclass(frozen=True, kw_only=True)
class _Signal:
    """Integers between layers; tensors are by channel.

    Attributes:
        name: The layer that sends them.
        shape: Shape without time and batch.
        unit: The real number that is 1.
        low, high: Their proven range, which includes 0.
        is_stream: True for the current of membrane shortcuts.
    """

    name: str
    shape: tuple[int, ...]
    unit: Tensor
    low: Tensor
    high: Tensor
    is_stream: bool = False


class _Term(NamedTuple):
    """Part of a current: real weights (C, ...) times a signal; op identity: (C,), by channel."""

    op: str
    name: str
    weight: Tensor
    x: _Signal
    sizes: dict[str, int]

    @property
    def most(self) -> int:
        """Largest weight."""
        is_small = int((self.x.high - self.x.low).max()) < 128 or self.x.is_stream
        return _MOST if is_small else _MOST_OF_BYTES

    @property
    def scale(self) -> Tensor:
        """Real value of 1 in each channel's whole weights."""
        return self.weight.flatten(1).abs().amax(1) / self.most


class _Current(NamedTuple):
    """Sum of terms and a bias, before a layer takes it."""

    terms: list[_Term]
    bias: Tensor
    shape: tuple[int, ...]


_Value = _Signal | _Current
_Range = tuple[Tensor, Tensor]


def convert(trained: Trained, timesteps: int) -> IntegerNetwork:
    """Convert a network to integers, whose ranges are proven for T timesteps.

    Raises:
        UserError: The network has inputs or layers without integers, or a sum could overflow.
    """
    kind = (trained.description.binning or {}).get("dtype", "uint8")
    builder, data = _Builder(trained.model, timesteps), trained.config.data
    if kind != "uint8":
        raise builder.refused(
            f"was trained on event frames of {kind}, and --int8 takes bytes: numbers of events"
        )
    return builder.build(trained.input_shape, data.mean, data.std)


class _Builder(Traversal[_Value]):
    instead = "another format, without --int8"

    def __init__(self, model: SpikingNetwork, timesteps: int) -> None:
        super().__init__(model)
        self.timesteps = timesteps
        self.layers: list[dict[str, Any]] = []
        self.tensors: dict[str, Tensor] = {}
        self.units: dict[str, list[float]] = {}

    @torch.no_grad()
    def build(
        self, shape: tuple[int, ...], mean: Sequence[float], std: Sequence[float]
    ) -> IntegerNetwork:
        model = self.model
        known = SEWResNet, SpikingResNet, MSResNet, VGGSNN, SpikingConvNet
        if not isinstance(model, known) or isinstance(model, PSNSEWResNet):
            raise self.refused(
                "is not among the networks for --int8: SEW-, spiking and MS-ResNets, VGGSNN and "
                "spiking_convnet"
            )
        for layer in (one for one in model.modules() if isinstance(one, NeuronLayer)):
            kinds, neuron = (LIF, PLIF, ILIF, NILIF), layer.neuron
            if type(neuron) not in kinds or not neuron.levels:
                raise self.refused(f"has {kind_of(neuron)} neurons without integers")
        if isinstance(model.fc, nn.Identity):
            raise self.refused("has no classifier")
        entry: dict[str, Any] = {"kind": model.input_kind, "shape": list(shape)}
        zero, unit = torch.zeros(shape[0]).long(), torch.ones(shape[0], dtype=torch.float64)
        if model.input_kind == "images":
            entry |= {"mean": list(mean), "std": list(std)}
            middle, spread = (torch.tensor(one, dtype=torch.float64) for one in (mean, std))
            zero, unit = (255 * middle).round().clamp(0, 255).long(), 1 / (255 * spread)
            # Padding is the whole level next to the mean; only the bias takes the rest.
            self.rest = zero * unit - middle / spread
            self.write("offset", "pixels", ["frame"], shape, 16, zero=zero.int())
        name = self.layers[0]["name"] if self.layers else "frame"
        current = self.run(_Signal(name=name, shape=shape, unit=unit, low=-zero, high=255 - zero))
        assert isinstance(current, _Current)
        logit = self.logits(current)
        description = {
            "timesteps": self.timesteps,
            "classes": model.num_classes,
            "input": entry,
            "layers": self.layers,
            "logit": logit,
            "units": self.units,
        }
        return IntegerNetwork(description, self.tensors)

    # Layers that become terms of a current.

    def convolution(
        self, name: str, conv: nn.Module, norm: BatchNorm | None, x: _Value
    ) -> _Current:
        assert isinstance(conv, nn.Conv2d)
        weight, bias = folded(conv, norm)
        stride, padding, kernel = conv.stride[0], int(conv.padding[0]), conv.kernel_size[0]
        x = x if isinstance(x, _Signal) else self.stream(f"{name}_in", x)
        if x.name == "pixels":
            bias = bias + weight.sum((2, 3)) @ self.rest
        sizes = {"stride": stride, "padding": padding}
        term = _Term("conv", name, weight * x.unit.view(-1, 1, 1), x, sizes)
        shape = (conv.out_channels, *pooled(x.shape[1:], kernel, stride, padding))
        return _Current([term], bias, shape)

    def linear(self, name: str, linear: nn.Module, x: _Value) -> _Current:
        assert isinstance(linear, nn.Linear)
        assert isinstance(x, _Signal)
        term = _Term("linear", name, linear.weight.double() * x.unit, x, {})
        return _Current([term], linear.bias.double(), (linear.out_features,))

    def plus(self, name: str, one: _Value, other: _Value) -> _Value:
        if isinstance(one, _Signal) and isinstance(other, _Signal):
            high = one.high + other.high
            self.prove(name, "spikes", high, 255)
            self.write("add", name, [one.name, other.name], one.shape, 8)
            return replace(one, name=name, high=high)
        first, second = _current(one), _current(other)
        return _Current(first.terms + second.terms, first.bias + second.bias, first.shape)

    # Layers that are written.

    def write(
        self, op: str, name: str, inputs: list[str], shape: tuple[int, ...], bits: int, **of: Any
    ) -> None:
        """Append a layer of outputs with some bits, unsigned if 8.

        Options that are tensors are its integers.
        """
        whole = {key: one for key, one in of.items() if isinstance(one, Tensor)}
        self.tensors |= {f"{name}.{key}": one.contiguous() for key, one in whole.items()}
        rest = {key: one for key, one in of.items() if key not in whole}
        layer = {"op": op, "name": name, "inputs": inputs, "shape": list(shape), "bits": bits}
        self.layers.append(layer | rest)

    def prove(self, name: str, what: str, reach: Tensor, most: int) -> None:
        """Raise a `UserError` if a layer's magnitudes could exceed ``most``."""
        if (worst := int(reach.max())) > most:
            raise self.refused(
                f"could overflow: {name} has {what} of up to {worst:,} at T={self.timesteps}, "
                f"and at most {most:,} fits"
            )

    def weighted(self, term: _Term, scale: Tensor, shape: tuple[int, ...]) -> _Range:
        """Write a term with int8 weights of a scale (C,); return the range of its sums."""
        scale = torch.where(scale > 0, scale, 1).view(-1, *(1,) * (term.weight.ndim - 1))
        whole = (term.weight / scale).round().clamp(-term.most, term.most)
        rows = whole.flatten(2).long() if whole.ndim > 2 else whole.long()[..., None]
        up, down = (rows.clamp(**{end: 0}).sum(2) for end in ("min", "max"))
        low = up @ term.x.low + down @ term.x.high
        high = up @ term.x.high + down @ term.x.low
        self.prove(term.name, "sums", torch.maximum(-low, high), _SUM)
        weight = whole.to(torch.int8)
        self.write(term.op, term.name, [term.x.name], shape, 32, weight=weight, **term.sizes)
        return low, high

    def neurons(self, name: str, module: nn.Module, x: _Value) -> _Signal:
        assert isinstance(module, NeuronLayer)
        config = module.neuron
        assert isinstance(config, (LIF, ILIF))
        terms, bias, shape = _current(x)
        decay, gain = config.decay, 1.0
        if isinstance(config, PLIF):
            share = float(module.learned["w"].double().sigmoid())
            decay, gain = 1 - share, share if config.decay_input else 1.0
        terms = [term._replace(weight=gain * term.weight) for term in terms]
        bias, unit = gain * bias, terms[0].weight
        if weights := [term for term in terms if term.op != "identity"]:
            least = bias.abs().clamp(min=config.threshold) / _COARSEST
            unit = torch.stack([least, *(term.scale for term in weights)]).amax(0)
        ranges = {term.name: self.weighted(term, unit, shape) for term in weights}
        factor = round(decay * 2**_DECAY_BITS)
        bits = _DECAY_BITS - (math.gcd(factor, 2**_DECAY_BITS).bit_length() - 1)
        ratio = factor >> (_DECAY_BITS - bits), bits
        for fraction in range(_FRACTION_BITS, -1, -1):
            per_real = 2**fraction / unit
            values = _thresholds(config, per_real) | {"bias": (bias * per_real).round().long()}
            gains, parts = dict[int, Tensor](), list[list[Tensor]]()
            for i, term in enumerate(terms):
                if term.op == "identity":
                    gains[i] = (term.weight * per_real).round().long()
                    parts.append([gains[i] * end for end in (term.x.low, term.x.high)])
                else:
                    parts.append([end << fraction for end in ranges[term.name]])
            reach = _reach(values, parts, ratio, self.timesteps)
            if int(reach.max()) < 2**MEMBRANE_BITS:
                break
        self.prove(name, "membranes", reach, 2**MEMBRANE_BITS - 1)
        inputs, shifts = [term.name for term in terms], [fraction] * len(terms)
        for i in gains if weights else ():
            inputs[i], shifts[i] = f"{name}_shortcut", 0
            self.write("scale", inputs[i], [terms[i].name], shape, 32, gain=gains[i].int())
        whole = {key: one.clamp(max=_SUM).int() for key, one in values.items()}
        of: Any = whole | {"shifts": shifts, "decay": list(ratio)}
        self.write("neurons", name, inputs, shape, 8, **of)
        self.units[name] = (unit / 2**fraction).tolist()
        high = torch.full((shape[0],), len(whole["thresholds"]))
        unit = torch.full((shape[0],), 1 / (config.levels or 1), dtype=torch.float64)
        return _Signal(name=name, shape=shape, unit=unit, low=0 * high, high=high)

    def stream(self, name: str, x: _Value) -> _Signal:
        """Write a current as int16, in units for which its proven range fits."""
        terms, bias, shape = _current(x)
        low, high, scales, ranges = bias, bias, list[Tensor](), list[_Range]()
        for term in terms:
            plain = term.op == "identity"
            scale = term.weight if plain else term.scale
            of = (term.x.low, term.x.high) if plain else self.weighted(term, scale, shape)
            low, high = low + scale * of[0], high + scale * of[1]
            scales, ranges = [*scales, scale], [*ranges, of]
        # 64 units are left for rounding.
        unit = (torch.maximum(-low, high) / (_STREAM - 64)).clamp(min=1e-30)
        gains = torch.stack([(2**STREAM_BITS * scale / unit).round().long() for scale in scales])
        half = 2 ** (STREAM_BITS - 1)
        whole = (2**STREAM_BITS * bias / unit).round().long() + half
        sums = [
            whole + sum(gain * of[end] for gain, of in zip(gains, ranges, strict=True))
            for end in (0, 1)
        ]
        least, most = (one >> STREAM_BITS for one in sums)
        self.prove(name, "currents", torch.maximum(-least, most), _STREAM)
        names = [term.name for term in terms]
        self.write("stream", name, names, shape, 16, gains=gains, bias=whole)
        self.units[name] = unit.tolist()
        return _Signal(
            name=name,
            shape=shape,
            unit=unit,
            low=least.clamp(max=0),
            high=most.clamp(min=0),
            is_stream=True,
        )

    def joined(self, name: str, function: str, residual: _Value, identity: _Value) -> _Signal:
        del name, residual, identity
        raise self.refused(f"joins spikes by {function}, and --int8 takes connect_function add")

    def max_pool(self, name: str, pool: MaxPool, x: _Value) -> _Signal:
        assert isinstance(x, _Signal)
        sizes: Any = pool.kernel_size, pool.stride, pool.padding
        kernel, stride, padding = sizes
        shape = (*x.shape[:1], *pooled(x.shape[1:], kernel, stride, padding))
        of = {"kernel": kernel, "stride": stride, "padding": padding}
        self.write("max_pool", name, [x.name], shape, 8, **of)
        return replace(x, name=name, shape=shape)

    def mean_pool(self, name: str, side: int | None, x: _Value) -> _Signal:
        assert isinstance(x, _Signal)
        side = side or x.shape[-1]
        shape = (*x.shape[:1], *pooled(x.shape[1:], side, side, 0))
        low, high = (side**2 * one for one in (x.low, x.high))
        bits = 8 if int(high.max()) < 256 and not int(low.min()) else 32
        self.write("sum_pool", name, [x.name], shape, bits, kernel=side)
        return replace(x, name=name, shape=shape, unit=x.unit / side**2, low=low, high=high)

    def flattened(self, x: _Value) -> _Signal:
        assert isinstance(x, _Signal)
        count = math.prod(x.shape[1:])
        spread = {key: getattr(x, key).repeat_interleave(count) for key in ("unit", "low", "high")}
        return replace(x, shape=(x.shape[0] * count,), **spread)

    def logits(self, x: _Current) -> float:
        """Write the classifier, and return the unit of all classes' logits."""
        (term,) = x.terms
        # Of 11 binary digits, so that sums of its multiples are exact in floating point, too.
        mantissa, exponent = math.frexp(float(term.scale.max()) or 1.0)
        unit = math.ldexp(math.ceil(mantissa * 2048), exponent - 11)
        low, high = self.weighted(term, torch.full_like(x.bias, unit), x.shape)
        bias = (x.bias / unit).round().long()
        reach = self.timesteps * torch.maximum(-low - bias, high + bias)
        self.prove("logits", "sums over time", reach, _SUM)
        self.write("logits", "logits", [term.name], x.shape, 32, bias=bias.int())
        return unit


def _current(x: _Value) -> _Current:
    """Return a signal as a current."""
    if isinstance(x, _Current):
        return x
    return _Current([_Term("identity", x.name, x.unit, x, {})], torch.zeros_like(x.unit), x.shape)


def _thresholds(config: LIF | ILIF, per_real: Tensor) -> dict[str, Tensor]:
    """Return thresholds that v must exceed, (D, C), and the step of a soft reset."""
    threshold = config.threshold * per_real
    if isinstance(config, ILIF):
        # Halves are rounded to even: from an odd number of spikes up, where v reaches them.
        steps = [(count + 0.5, count % 2 == 1) for count in range(config.most_spikes)]
    else:
        steps = [(1.0, config.fires_at_threshold)]
    thresholds = [
        (level * threshold).ceil() - 1 if reached else (level * threshold).floor()
        for level, reached in steps
    ]
    values = {"thresholds": torch.stack(thresholds).long()}
    if isinstance(config, ILIF) or not config.resets_to_zero:
        values["step"] = threshold.round().long()
    return values


def _reach(
    values: dict[str, Tensor], parts: list[list[Tensor]], ratio: tuple[int, int], timesteps: int
) -> Tensor:
    """Return the largest magnitude of a layer's membranes and of their partial sums, (C,)."""
    bias, thresholds, step = values["bias"], values["thresholds"], values.get("step")
    low, high = (bias + sum(part[end] for part in parts) for end in (0, 1))
    largest = bias.abs() + sum(torch.maximum(-part[0], part[1]) for part in parts)
    start = end = torch.zeros_like(bias)
    reach = largest
    for _ in range(timesteps):
        start, end = (ratio[0] * one >> ratio[1] for one in (start, end))
        reach = torch.maximum(reach, largest + torch.maximum(-start, end))
        start, end = start + low, end + high
        if step is None:
            start, end = start.clamp(max=0), torch.minimum(end, thresholds[0])
        else:
            counts = torch.arange(len(thresholds) + 1).view(-1, 1)
            least = thresholds + 1 - counts[1:] * step
            most = torch.cat([thresholds, end[None]]) - counts * step
            start, end = torch.minimum(start, least.amin(0)), torch.minimum(end, most.amax(0))
    return reach
