"""A network that computes in integers: its definition. integers.py converts networks to it.

Weights are int8 with a scale for each output channel. Batch norms and scales are folded into int32
biases and thresholds. With ``a`` the int32 sums of weights times inputs, and F fraction bits, a
timestep of a layer of neurons is

    v = (m * u >> r) + 2^F * a + bias         decay m / 2^r; the shift rounds down
    n = number of thresholds that v exceeds   0 or 1; I-LIF: up to D
    u = 0 if n > 0 else v                     hard reset
    u = v - n * step                          soft reset

Decays that are multiples of 1/4096, such as 0.5, are exact. Inputs are pixels or counts of events
(uint8), then numbers of spikes. Means over windows are sums, whose divisor is in the next scale.
The current between blocks with membrane shortcuts is int16: a block's sums are added to it by
``(sum of gain * a + bias) >> 24``, in units for which its proven range fits.

All layers but neurons compute all timesteps at once. Sums of integers are exact in any order, so
convolutions of spikes may skip zeros (nn/fast/native_zeros.py), and others run in floating point.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tetdist.errors import UserError
from tetdist.nn.fast import native_integers, native_zeros
from tetdist.wording import counted

MEMBRANE_BITS = 30  # Plus 2^30, membranes are unsigned, which ONNX can shift.
STREAM_BITS = 24

_Layer = dict[str, Any]
_Values = dict[str, Tensor]


class IntegerNetwork(nn.Module):
    """A network that computes in integers.

    Args:
        description: T, classes, input, layers in order, and units.
        tensors: Integers of the layers, by ``LAYER.NAME``.
    """

    def __init__(self, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.description = description
        self.timesteps: int = description["timesteps"]
        self.num_classes: int = description["classes"]
        self.input_kind: str = description["input"]["kind"]
        self.layers: list[_Layer] = description["layers"]
        whole: dict[str, dict[str, nn.Parameter]] = {layer["name"]: {} for layer in self.layers}
        for name, value in tensors.items():
            owner, _, key = name.partition(".")
            whole[owner][key] = nn.Parameter(value, requires_grad=False)
        values = nn.ModuleDict({name: nn.ParameterDict(of) for name, of in whole.items()})
        self.values: Any = values
        self._binary = set[str]()  # layers that send spikes of 0 and 1
        for layer in self.layers:
            is_pool = layer["op"] == "max_pool" and layer["inputs"][0] in self._binary
            thresholds = whole[layer["name"]].get("thresholds")
            if is_pool or (thresholds is not None and len(thresholds) == 1):
                self._binary.add(layer["name"])

    def numbers(self, layer: str) -> dict[str, Any]:
        """Return a layer's integers as arrays."""
        return {key: value.detach().numpy() for key, value in self.values[layer].items()}

    def set_timesteps(self, timesteps: int) -> None:
        """Change T, up to the T that ranges are proven for."""
        if timesteps > (proven := self.description["timesteps"]):
            raise UserError(f"timesteps: ranges are proven for up to {proven}, not {timesteps}")
        self.timesteps = timesteps

    def forward(self, x: Tensor, per_timestep: bool = False) -> Tensor:
        """Return logits as a `SpikingNetwork` does, in float64."""
        frames = self.frames(x)[: self.timesteps]
        if self.input_kind == "events" and len(frames) < self.timesteps:
            raise ValueError(
                f"the network runs {self.timesteps} timesteps, but the input has {len(frames)} bins"
            )
        sums, _ = self.run(frames, self.timesteps, {})
        logits = sums.double() * self.description["logit"]
        return logits if per_timestep else logits.mean(0)

    def frames(self, x: Tensor) -> Tensor:
        """Return the bytes of normalised images, (1, B, C, H, W), or of counts, (T, B, ...)."""
        entry = self.description["input"]
        if self.input_kind == "events":
            return x.round().clamp(0, 255).to(torch.uint8).transpose(0, 1)
        mean, std = (x.new_tensor(entry[key]).double().view(-1, 1, 1) for key in ("mean", "std"))
        return (255 * (x * std + mean)).round().clamp(0, 255).to(torch.uint8)[None]

    def stream(self) -> "IntegerStream":
        """Return a stream of it, which takes one timestep after another."""
        return IntegerStream(self)

    def step(self, frame: Tensor, states: _Values) -> tuple[Tensor, _Values]:
        """Run one timestep.

        Args:
            frame: Bytes, (B, C, H, W).
            states: Membranes after the previous timestep, by layer; empty: at rest.

        Returns:
            The timestep's logits in units, (B, K), and the membranes after it.
        """
        sums, after = self.run(frame[None], 1, states)
        return sums[0], after

    @torch.no_grad()
    def run(
        self, frames: Tensor, timesteps: int, states: _Values, known: _Values | None = None
    ) -> tuple[Tensor, _Values]:
        """Run timesteps, of one frame for all or one frame each, (1 or T, B, C, H, W).

        Args:
            states: Membranes before the first of them, by layer; empty: at rest.
            known: Outputs of layers before all neurons for the same frame, to take if there are
                any, and to fill if not.

        Returns:
            Logits in units, (T, B, K), int32, and the membranes after the last timestep, by layer.
        """
        outputs, after = {"frame": frames} | (known or {}), _Values()
        constant = {"frame"}
        # Under autocast, convolutions in float32 would not be exact.
        with torch.autocast(frames.device.type, enabled=False):
            for layer in self.layers:
                name = layer["name"]
                inputs, values = [outputs[one] for one in layer["inputs"]], dict(self.values[name])
                if layer["op"] == "neurons":
                    state = states.get(name)
                    outputs[name], after[name] = _fire(layer, values, inputs, state, timesteps)
                    continue
                if name not in outputs:
                    outputs[name] = self._output(layer, values, inputs)
                if constant.issuperset(layer["inputs"]):
                    constant.add(name)
                    if known is not None:
                        known[name] = outputs[name]
        logits = outputs[self.layers[-1]["name"]]
        return logits.expand(timesteps, *logits.shape[1:]), after

    def _output(self, layer: _Layer, values: _Values, inputs: list[Tensor]) -> Tensor:
        """Return a layer's output (T or 1, B, ...), of all timesteps at once."""
        most = max(map(len, inputs))
        flat = [one.expand(most, *one.shape[1:]).flatten(0, 1) for one in inputs]
        y = None
        if layer["op"] == "conv" and layer["inputs"][0] in self._binary:
            y = self._skipping(layer, values["weight"], flat[0])
        if y is None:
            y = _LAYERS[layer["op"]](layer, values, *flat)
        return y.unflatten(0, (most, -1))

    def _skipping(self, layer: _Layer, weight: Tensor, x: Tensor) -> Tensor | None:
        """Convolve spikes of 0 and 1, skipping zeros; None where that is not done."""
        is_known = (
            weight.shape[2:] == (3, 3) and layer["padding"] == 1 and layer["stride"] in (1, 2)
        )
        if not (is_known and native_zeros.serves(x, weight, torch.int8)):
            return None
        owner = self.values[layer["name"]]
        of = native_zeros.Layer(owner, weight, None, layer["stride"])
        return native_zeros.convolve(x, of, torch.int8)


class IntegerStream:
    """A stream of an integer network, with `step` and `keep` as of `models.streaming.Stream`."""

    def __init__(self, network: IntegerNetwork) -> None:
        self.network = network
        self._states: _Values = {}
        self._known: _Values = {}
        self._frame: Tensor | None = None
        self._sum: Tensor | None = None
        self.timesteps = 0

    @torch.no_grad()
    def step(self, x: Tensor | None = None) -> Tensor:
        """Run one timestep and return the mean of the logits so far, (B, K), float64.

        Args:
            x: An image or event frame, (B, C, H, W); None: the last one again.

        Raises:
            UserError: It has taken all timesteps that ranges are proven for, or there is no frame.
        """
        network = self.network
        if self.timesteps == (proven := network.description["timesteps"]):
            raise UserError(
                f"ranges are proven for {counted(proven, 'timestep')}, and this stream has taken "
                "them; start a new one, or convert the network for more"
            )
        if x is not None:
            self._frame, self._known = (
                network.frames(x[:, None] if network.input_kind == "events" else x),
                {},
            )
        if self._frame is None:
            raise UserError("step() repeats the last frame, but there is none; call step(x)")
        with native_zeros.keeping_weights():
            sums, self._states = network.run(self._frame, 1, self._states, self._known)
        logits = sums[0].double() * network.description["logit"]
        self._sum = logits if self._sum is None else self._sum + logits
        self.timesteps += 1
        return self._sum / self.timesteps

    def keep(self, mask: Tensor) -> None:
        """Drop the samples whose ``mask``, (B,), bool, is False; the others stay in their order."""
        assert self._sum is not None
        assert self._frame is not None
        self._sum, self._frame = self._sum[mask], self._frame[:, mask]
        self._known = {name: value[:, mask] for name, value in self._known.items()}
        self._states = {name: state[mask] for name, state in self._states.items()}


def _exactly(function: Callable[..., Tensor], most: int, *of: Tensor) -> Tensor:
    """Compute sums of integers, none above ``most``, in floating point, where it is exact.

    A GPU may round float32 to TensorFloat-32.
    """
    narrow = most < 2**24 and of[0].device.type == "cpu"
    return function(*(one.to(torch.float32 if narrow else torch.float64) for one in of)).int()


def _most(x: Tensor, weight: Tensor) -> int:
    """Return what no sum of an output's weights times inputs exceeds."""
    largest = int(x.abs().max()) if len(x) else 0
    return largest * int(weight.flatten(1).long().abs().sum(1).max())


def _over(values: Tensor, x: Tensor) -> Tensor:
    """Return values by channel as they broadcast over a signal (B, C, ...)."""
    return values.view(-1, *(1,) * (x.ndim - 2))


def _stream(_: _Layer, values: _Values, *x: Tensor) -> Tensor:
    gained = (_over(gain, one) * one.long() for gain, one in zip(values["gains"], x, strict=True))
    return (sum(gained, _over(values["bias"], x[0])) >> STREAM_BITS).int()


def _convolution(layer: _Layer, values: _Values, x: Tensor) -> Tensor:
    sizes = {"stride": layer["stride"], "padding": layer["padding"]}
    convolve, weight = partial(F.conv2d, **sizes), values["weight"]
    return _exactly(convolve, _most(x, weight), x, weight)


def _linear(_: _Layer, values: _Values, x: Tensor) -> Tensor:
    flat, weight = x.flatten(1), values["weight"]
    return _exactly(F.linear, _most(flat, weight), flat, weight)


def _max_pool(layer: _Layer, _: _Values, x: Tensor) -> Tensor:
    sizes = layer["kernel"], layer["stride"], layer["padding"]
    return _exactly(lambda x: F.max_pool2d(x, *sizes), 255, x).to(x.dtype)


def _sum_pool(layer: _Layer, _: _Values, x: Tensor) -> Tensor:
    side = layer["kernel"]
    most = int(x.abs().max()) * side**2 if len(x) else 0
    return _exactly(lambda x: F.avg_pool2d(x, side, divisor_override=1), most, x)


# A layer's output, from the layer, its integers and its inputs (N, C, ...).
_LAYERS: dict[str, Callable[..., Tensor]] = {
    "offset": lambda _, values, x: x.int() - _over(values["zero"], x),
    "conv": _convolution,
    "linear": _linear,
    "scale": lambda _, values, x: x.int() * _over(values["gain"], x),
    "stream": _stream,
    "add": lambda _layer, _values, x, y: x + y,
    "max_pool": _max_pool,
    "sum_pool": _sum_pool,
    "logits": lambda _, values, x: x + values["bias"],
}


def _fire(
    layer: _Layer,
    values: _Values,
    inputs: list[Tensor],
    membrane: Tensor | None,
    timesteps: int,
) -> tuple[Tensor, Tensor]:
    """Return numbers of spikes, (T, B, C, ...), uint8, and the membranes after them, (B, C, ...).

    Args:
        inputs: Currents, (T or 1, B, C, ...).
    """
    if inputs[0].device.type == "cpu" and len(inputs) <= 2 and native_integers.library():
        # In C++, with channels last.
        shape = inputs[0].movedim(2, -1).shape[1:]  # (B, ..., C)
        currents = [one.int().movedim(2, -1).flatten(1, -2) for one in inputs]
        before = None if membrane is None else membrane.movedim(1, -1).flatten(0, -2).contiguous()
        spikes, after = native_integers.fire(
            currents, layer["shifts"], values, layer["decay"], before, timesteps
        )
        return spikes.view(timesteps, *shape).movedim(-1, 2), after.view(shape).movedim(-1, 1)
    factor, bits = layer["decay"]
    counts: list[Tensor] = []
    for t in range(timesteps):
        v = _over(values["bias"], inputs[0][0])
        if membrane is not None:
            v = v + (factor * membrane.long() >> bits).int()
        for current, shift in zip(inputs, layer["shifts"], strict=True):
            v = v + (current[t if len(current) > 1 else 0].int() << shift)
        count = torch.zeros_like(v)
        for threshold in values["thresholds"]:
            count += v > _over(threshold, v)
        reset = torch.where(count > 0, 0, v)
        if "step" in values:
            reset = v - count * _over(values["step"], v)
        counts, membrane = [*counts, count.to(torch.uint8)], reset
    assert membrane is not None
    return torch.stack(counts), membrane
