"""Published networks as a golden file: names and shapes of their weights, and what they compute.

The numbers in golden/networks.json come from definitions of these networks in plain torch, with
weights and inputs drawn here. They are the same on every processor.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

import tetdist
from tetdist import order
from tetdist.apps.weights import foreign
from tetdist.models import SpikingNetwork

assert tetdist.__doc__  # registers the models

FILE = Path(__file__).parent / "golden" / "networks.json"
NAMES = sorted(json.loads(FILE.read_text()))
BATCH = 3
_OF_NORM = ("weight", "bias", "running_mean", "running_var")


def uniform(name: str, shape: tuple[int, ...], low: float = -1.0, high: float = 1.0) -> Tensor:
    """Numbers that float32 has, in float64; those of a name."""
    stream = order.named_stream(name)
    draws = order.uniforms(0, 0, np.zeros(1, np.int64), math.prod(shape), stream)
    return torch.from_numpy(low + (high - low) * draws).view(shape).float().double()


class Published:
    """A published network in a small size.

    Attributes:
        model: Name of our network, which has these ``arguments``.
        source: Repository of the weights.
        timesteps: T.
        input: Shape of a sample: (C, H, W), or (T, C, H, W) of events.
        tensors: Shape of each tensor by the authors' name; of a norm its number of channels.
        drawn: Seed, gain of convolutions and range of norms' biases; such that samples and
            timesteps come out different.
        logits: Its logits (T, B, K) in evaluation (``eval``) and training (``train``).
        gradients: Projections of its parameters' gradients in both, by name.
        statistics: Projections of its norms' running means and variances after the training pass.
    """

    def __init__(self, name: str, **of: Any) -> None:
        self.name = name
        of = of or json.loads(FILE.read_text())[name]
        self.model: str = of["model"]
        self.arguments: dict[str, Any] = of["arguments"]
        self.source: str = of["source"]
        self.timesteps: int = of["timesteps"]
        self.input: tuple[int, ...] = tuple(of["input"])
        self.tensors: dict[str, list[int] | int] = of["tensors"]
        self.drawn: dict[str, Any] = of["drawn"]
        self.logits: dict[str, Any] = of.get("logits", {})
        self.gradients: dict[str, list[float]] = of.get("gradients", {})
        self.statistics: dict[str, list[float]] = of.get("statistics", {})

    def state(self) -> dict[str, Tensor]:
        """The authors' state dict; some gains of norms are negative."""
        drawn: dict[str, Tensor] = {}
        seed, gain, bias = (self.drawn[key] for key in ("seed", "gain", "bias"))
        ranges = {"bias": bias, "running_mean": (-0.3, 0.3), "running_var": (0.3, 1.0)}
        for name, shape in self.tensors.items():
            if isinstance(shape, int):
                for one in _OF_NORM:
                    limits = ranges.get(one, (0.6, 1.8))
                    drawn[f"{name}.{one}"] = uniform(f"{seed} {name}.{one}", (shape,), *limits)
                signs = torch.where(uniform(f"{seed} {name} signs", (shape,)) < -0.6, -1, 1)
                drawn[f"{name}.weight"] *= signs
                drawn[f"{name}.num_batches_tracked"] = torch.tensor(7)
                continue
            most = (3 / math.prod(shape[1:])) ** 0.5 * (gain if len(shape) > 2 else 1)
            drawn[name] = uniform(f"{seed} {name}", tuple(shape), -most, most)
        return drawn

    def built(self, **options: Any) -> SpikingNetwork:
        """Our network."""
        neuron = foreign.neuron_of(self.source, self.model)
        arguments = {"neuron": neuron} | foreign.arguments_of(self.source, self.model)
        arguments |= self.arguments | options
        return timm.create_model(
            self.model, num_classes=4, timesteps=self.timesteps, **arguments
        ).double()

    def loaded(self) -> SpikingNetwork:
        """Our network with the weights of `state`."""
        model = self.built()
        found = foreign.convert(self.state(), self.source, model)
        assert (found.missing, found.unexpected) == ([], [])
        model.load_state_dict(found.weights)
        return model

    def batch(self) -> Tensor:
        if len(self.input) == 3:
            return uniform("images", (BATCH, *self.input), -(3**0.5), 3**0.5)
        return uniform("events", (BATCH, *self.input), -2.5, 2.5).abs().round()

    def keys(self, model: SpikingNetwork) -> dict[str, str]:
        """The authors' name of each tensor of our network, as the conversion has them."""
        state = self.state()
        numbered = {
            key: torch.full_like(value, i).double() for i, (key, value) in enumerate(state.items())
        }
        found = foreign.convert(numbered, self.source, model).weights
        return {own: list(state)[int(value.flatten()[0])] for own, value in found.items()}


def projected(values: dict[str, Tensor]) -> dict[str, float]:
    """A number for each tensor, which changes with each of its elements."""
    return {
        key: float((value.flatten() * uniform(f"onto {key}", (value.numel(),))).sum())
        for key, value in values.items()
    }


def sew_layout(state: dict[str, Tensor], sew: bool) -> dict[str, Tensor]:
    """torchvision's names as the repository of SEW-ResNet has them: layers in containers."""
    renamed = {}
    for key, value in state.items():
        name = key
        if key.startswith("layer"):
            name = re.sub(r"\.conv(\d)\.", r".conv\1.module.0.", name)
            name = re.sub(r"\.bn(\d)\.", r".conv\1.module.1.", name)
            container = "downsample.0.module." if sew else "downsample.module."
            name = name.replace("downsample.", container)
        renamed[name] = value
    return renamed
