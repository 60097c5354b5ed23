"""Spiking networks, registered with timm: ``timm.create_model("sew_resnet34", timesteps=4)``."""

import inspect
from collections.abc import Mapping

import timm

from tetdist.models.base import SpikingNetwork
from tetdist.models.sew_resnet import SEWResNet
from tetdist.models.spiking_convnet import SpikingConvNet
from tetdist.models.spiking_resnet import SpikingResNet
from tetdist.models.vggsnn import VGGSNN

_CLASSES: dict[str, type[SpikingNetwork]] = {
    "sew_resnet": SEWResNet,
    "spiking_resnet": SpikingResNet,
    "vggsnn": VGGSNN,
    "spiking_convnet": SpikingConvNet,
}
MODEL_MODULES = tuple(_CLASSES)


def arguments_of(name: str) -> list[str]:
    """The arguments that a registered model leaves open, besides classes, T, neuron and input."""
    fixed = {"self", "block", "layers", "neuron", "num_classes", "timesteps", "in_chans"}
    return [parameter for parameter in _parameters(name) if parameter not in fixed]


def default_timesteps(name: str) -> int:
    """T of a registered model where nobody says another."""
    return int(_parameters(name)["timesteps"].default)


def _parameters(name: str) -> Mapping[str, inspect.Parameter]:
    module = timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1]
    return inspect.signature(_CLASSES[module].__init__).parameters


__all__ = ["VGGSNN", "SEWResNet", "SpikingConvNet", "SpikingNetwork", "SpikingResNet"]
