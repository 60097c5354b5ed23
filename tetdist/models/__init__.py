"""Spiking networks, registered with timm: ``timm.create_model("sew_resnet34", timesteps=4)``.

Register your own network with timm, too, in a file that a configuration imports. It must implement
`base.SpikingModel`.
"""

import inspect
import typing
from typing import Any

import timm
import torch
from torch import nn

from tetdist import plugins
from tetdist.models.base import SpikingModel, SpikingNetwork
from tetdist.models.espikeformer import ESpikeFormer
from tetdist.models.max_former import MaxFormer
from tetdist.models.ms_qkformer import MSQKFormer
from tetdist.models.ms_resnet import MSResNet
from tetdist.models.preact_resnet import PreActResNet
from tetdist.models.psn_sew_resnet import PSNSEWResNet
from tetdist.models.qkformer import QKFormer
from tetdist.models.sew_resnet import SEWResNet
from tetdist.models.spike_driven_transformer import SpikeDrivenTransformer
from tetdist.models.spiking_convnet import SpikingConvNet
from tetdist.models.spiking_resnet import SpikingResNet
from tetdist.models.vggsnn import VGGSNN
from tetdist.nn.neurons import LIF, NeuronConfig

__all__ = [
    "VGGSNN",
    "ESpikeFormer",
    "MSQKFormer",
    "MSResNet",
    "MaxFormer",
    "PSNSEWResNet",
    "PreActResNet",
    "QKFormer",
    "SEWResNet",
    "SpikeDrivenTransformer",
    "SpikingConvNet",
    "SpikingModel",
    "SpikingNetwork",
    "SpikingResNet",
]

# Arguments that have their own configuration key or belong to the registered variant.
_FIXED = ("self", "block", "layers", "neuron", "num_classes", "timesteps", "in_chans")


def names() -> list[str]:
    """Return the names of all spiking models: tetdist's, and those of imported files."""
    homes = (f"{__name__}.", f"{plugins.PACKAGE}.")
    return [
        name
        for name in timm.list_models()
        if timm.model_entrypoint(name).__module__.startswith(homes)
    ]


def class_of(name: str) -> type[nn.Module] | None:
    """Return the class of a registered model, by its function's return annotation, or None."""
    found = typing.get_type_hints(timm.model_entrypoint(name)).get("return")
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def arguments_of(name: str) -> list[str] | None:
    """Return a registered model's arguments besides classes, T and neuron; None: unknown."""
    parameters = inspect.signature(class_of(name) or timm.model_entrypoint(name)).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return None
    return [parameter for parameter in parameters if parameter not in _FIXED]


def default_timesteps(name: str) -> int:
    """Return the default T of one of tetdist's models."""
    with torch.device("meta"):
        return int(timm.create_model(name).timesteps)


def default_neuron(name: str) -> NeuronConfig:
    """Return the default neuron of a registered model: the published one, or LIF."""
    neuron: Any = getattr(class_of(name), "default_neuron", None)
    return neuron if isinstance(neuron, NeuronConfig) else LIF()


def input_kind(name: str) -> str | None:
    """Return a registered model's input, ``images`` or ``events``; None: known once it is built."""
    kind: Any = getattr(class_of(name), "input_kind", None)
    return kind if isinstance(kind, str) else None


def takes_both(name: str) -> bool:
    """Return whether a registered model takes images, and with `input_kind="events"` events."""
    return input_kind(name) == "images" and issubclass(class_of(name) or nn.Module, SpikingNetwork)
