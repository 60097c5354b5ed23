"""Streaming: run a network one timestep at a time, with membranes carried from step to step."""

import copy
import math
from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from tetdist.errors import UserError
from tetdist.nn import neurons
from tetdist.nn.fast import native_zeros
from tetdist.nn.norm_neuron import NeuronLayer, carrying_membranes
from tetdist.nn.packed import Conv2d
from tetdist.wording import counted


class Streamed(Protocol):
    """The methods of a `SpikingNetwork` that a stream calls."""

    training: bool
    num_classes: int

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...
    def check_size(self, x: Tensor) -> None: ...
    def frame(self, x: Tensor, t: int) -> Tensor: ...
    def features_of(self, x: Tensor, timesteps: int) -> Tensor: ...
    def forward_head(self, x: Tensor, *, per_timestep: bool) -> Tensor: ...

    looks_ahead: bool | None


def carrying_layers(model: Streamed) -> dict[str, NeuronLayer]:
    """Return the layers of a model that carry membranes, by name.

    Raises:
        UserError: The network or a neuron needs all timesteps at once.
    """
    if model.looks_ahead:
        raise UserError(
            f"{type(model).__name__} looks ahead: its logits depend on later timesteps, so it "
            "cannot take one timestep after another; run all T at once"
        )
    layers = {name: m for name, m in model.named_modules() if isinstance(m, NeuronLayer)}
    for name, layer in layers.items():
        if not layer.neuron.segments:
            raise UserError(
                f"{name} has {neurons.kind_of(layer.neuron)} neurons, whose weights combine all "
                "timesteps, so they cannot take one timestep after another; train the network "
                "with model.neuron.kind=sliding_psn or lif"
            )
    return layers


def run_step(
    model: Streamed, frame: Tensor, layers: list[NeuronLayer], membranes: list[Tensor] | None
) -> tuple[Tensor, list[Tensor]]:
    """Run one timestep.

    Args:
        model: The network, in evaluation mode.
        frame: The input as `SpikingNetwork.frame` returns it, (1, B, C, H, W).
        membranes: Their membranes after the previous timestep; None: at rest.

    Returns:
        The timestep's logits, (B, K), and the membranes after it.
    """
    with carrying_membranes(layers, membranes) as ends, native_zeros.keeping_weights():
        logits = model.forward_head(model.features_of(frame, 1), per_timestep=True)
        return logits[0], ends()


class _FirstConv(nn.Module):
    """A network's first convolution, which computes its last input's result only once.

    It holds that input, so that no other one has its place in memory.
    """

    def __init__(self, conv: Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.input: Tensor | None = None
        self.result: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.result is None or self.input is None or x.data_ptr() != self.input.data_ptr():
            self.input, self.result = x, self.conv(x)
        return self.result


def _with(module: nn.Module, path: list[str], replacement: nn.Module) -> nn.Module:
    """Return a copy of a module with another one at a path; it shares all others, and weights."""
    name, *rest = path
    child = _with(module.get_submodule(name), rest, replacement) if rest else replacement
    changed = copy.copy(module)
    changed._modules = module._modules | {name: child}
    return changed


class Stream:
    """A network that takes one timestep after another; `SpikingNetwork.stream` makes it.

    The weights are the model's, and a stream changes nothing of it: several threads may each run
    streams of one model. Change weights by ``load_state_dict``, ``copy_`` or an optimiser: what is
    written through their ``.data`` is not seen on a CPU that skips zeros.

    Attributes:
        timesteps: Steps since the start or the last `reset`.

    Args:
        model: A network; in evaluation mode at each step.

    Raises:
        UserError: The model's neurons need all timesteps at once.
    """

    def __init__(self, model: Streamed) -> None:
        self.model = model
        self._layers = carrying_layers(model)
        convolutions = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
        self._first_name = next(iter(convolutions), "")
        self._first = convolutions.get(self._first_name)
        self.reset()

    def reset(self) -> None:
        """Restart: membranes at rest, no logits, any number of samples."""
        self.timesteps = 0
        self._shape: tuple[int, ...] = ()  # of a sample of the last frame
        self._input: Tensor | None = None
        self._convolved = _FirstConv(self._first) if isinstance(self._first, Conv2d) else None
        self._membranes: list[Tensor] | None = None
        self._sum: Tensor | None = None

    @torch.no_grad()
    def step(self, x: Tensor | None = None) -> Tensor:
        """Run one timestep and return the mean of the logits so far, (B, K), float32 at least.

        A frame that is refused leaves the stream as it was.

        Args:
            x: An image or event frame, (B, C, H, W); None: the last one again, without recomputing
                its first convolution.

        Raises:
            UserError: The frame is not (B, C, H, W) or does not suit the network or the last one,
                is not finite, the first one is None, or the model is in training mode.
        """
        image = self._checked(x)
        if x is not None:
            # A copy, since the caller may write the next frame into the same memory.
            image = image.clone(memory_format=torch.channels_last)
        frame, layers = self.model.frame(image, self.timesteps), list(self._layers.values())
        logits, membranes = run_step(self._network(), frame, layers, self._membranes)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # In float64, as losses.running_means.
        self._sum = wide.double() if self._sum is None else self._sum + wide.double()
        self._input, self._membranes, self._shape = image, membranes, tuple(image.shape[1:])
        self.timesteps += 1
        return self._sum.to(wide.dtype) / self.timesteps

    def _network(self) -> Any:
        """Return the model as it is now, but with the stream's own first convolution."""
        if self._convolved is None:
            return self.model
        return _with(cast(nn.Module, self.model), self._first_name.split("."), self._convolved)

    def _checked(self, x: Tensor | None) -> Tensor:
        if self.model.training:
            raise UserError("a stream needs a network in evaluation mode; call model.eval() first")
        if x is None:
            if self._input is None:
                raise UserError("step() repeats the last frame, but there is none; call step(x)")
            return self._input
        if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point():
            raise UserError(
                "a frame must be a tensor of one timestep (B, C, H, W) of floating-point numbers, "
                f"not {_described(x)}"
            )
        held = None if self._sum is None else (len(self._sum), *self._shape)
        if held not in (None, x.shape):
            raise UserError(
                f"the frame is {tuple(x.shape)}, but the stream's are {held}; call reset() for "
                "other samples or another size, or keep(mask) to drop some of the samples"
            )
        self.model.check_size(x)
        if (first := self._first) is not None:
            if x.shape[1] != first.in_channels:
                wanted = counted(first.in_channels, "channel")
                raise UserError(f"the network takes frames of {wanted}, not of {x.shape[1]}")
            dtype = first.weight.dtype
            if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
                raise UserError(f"the network takes frames of {dtype}; call x.to({dtype})")
        # The sum is fast, but may overflow.
        if not math.isfinite(x.sum().item()) and not x.isfinite().all():
            raise UserError("a frame holds NaN or infinity; give finite numbers")
        return x

    def keep(self, mask: Tensor) -> None:
        """Drop the samples whose ``mask``, (B,), bool, is False; the others stay in their order.

        Raises:
            UserError: The mask does not fit the stream's samples, or there are none yet.
        """
        if self._sum is None or self._membranes is None:
            raise UserError("the stream has no samples before its first step; call step(x) first")
        samples = len(self._sum)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (samples,):
            raise UserError(
                f"keep needs a bool mask ({samples},), one value per sample of the stream, not "
                f"{_described(mask)}"
            )
        kept = mask.nonzero()[:, 0]
        self._sum = self._sum[kept]
        self._membranes = [
            membrane.index_select(layer.neuron.sample_axis, kept)
            for layer, membrane in zip(self._layers.values(), self._membranes, strict=True)
        ]
        if self._input is not None:
            self._input = self._input[kept].contiguous(memory_format=torch.channels_last)
            if self._convolved is not None and self._convolved.result is not None:
                self._convolved.input = self._input
                self._convolved.result = self._convolved.result[:, kept]

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` continues from: timesteps, logits, membranes, shape."""
        membranes = self._membranes or []
        return {
            "timesteps": self.timesteps,
            "sum": self._sum,
            "membranes": dict(zip(self._layers, membranes, strict=False)),
            "shape": self._shape,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, also of another stream of the same network.

        Raises:
            UserError: The state is of another network, not finite, or none. The stream stays as it
                was.
        """
        if not isinstance(state, dict) or state.keys() != self.state_dict().keys():
            raise UserError("the state is not one that a stream's state_dict() returned")
        total, timesteps = state["sum"], state["timesteps"]
        if total is not None:
            self._check_state(state["membranes"], total, state["shape"])
        if type(timesteps) is not int or timesteps < 0 or (timesteps == 0) != (total is None):
            raise UserError(f"the state has timesteps={timesteps}, which its sum contradicts")
        self.reset()
        if total is not None:
            self.timesteps, self._sum, self._shape = timesteps, total, tuple(state["shape"])
            self._membranes = list(state["membranes"].values()) or None

    def _check_state(self, membranes: Any, total: Any, shape: Any) -> None:
        """Compare a state with that of another stream after a step of one sample."""
        trial = Stream(self.model)
        try:
            like = torch.zeros(()) if self._first is None else self._first.weight
            trial.step(like.new_zeros(1, *shape))
            axes = [0, *(layer.neuron.sample_axis for layer in self._layers.values())]
            known = {"sum": trial._sum} | trial.state_dict()["membranes"]
            held = {"sum": total} | membranes
            if list(held) != list(known):
                raise ValueError("it has other neurons")
            for axis, (name, one) in zip(axes, known.items(), strict=True):
                right = _described(one.repeat_interleave(len(total), axis))
                if (found := _described(held[name])) != right:
                    raise ValueError(f"{name} is {found}, not {right}")
                if not held[name].isfinite().all():
                    raise ValueError(f"{name} holds NaN or infinity")
        except (RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"the state is not one of this network: {error}") from error


def _described(x: object) -> str:
    of = f" {tuple(x.shape)} of {x.dtype} on {x.device}" if isinstance(x, Tensor) else ""
    return type(x).__name__ + of


def stream_of(model: nn.Module) -> Stream:
    """Return a stream of a network that may be a user's own.

    Raises:
        UserError: The network cannot be streamed.
    """
    if not hasattr(model, "stream"):
        name = type(model).__name__
        raise UserError(f"{name} has no stream(); only a SpikingNetwork has (docs/extending.md)")
    stream: Stream = model.stream()  # type: ignore[operator]  # a method, for nn.Module a tensor
    return stream
