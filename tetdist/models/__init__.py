"""Spiking networks, registered with timm: ``timm.create_model("sew_resnet34", timesteps=4)``.

Register your own network with timm, too, in a file that a configuration imports. It must implement
`base.SpikingModel`.
"""

import inspect
import typing
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import nn

from tetdist import plugins
from tetdist.errors import UserError
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
from tetdist.nn.batch_norm import running_states
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

# Arguments that a configuration sets elsewhere, and where.
SET_ELSEWHERE = {
    "neuron": "set model.neuron instead",
    "num_classes": "set model.num_classes instead",
    "timesteps": "set phases.N.timesteps instead",
    "in_chans": "the data give it, 3 for images and 2 for events; remove it",
}


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
    cls = typing.get_type_hints(timm.model_entrypoint(name)).get("return")
    return cls if isinstance(cls, type) and issubclass(cls, nn.Module) else None


def arguments_of(name: str) -> list[str] | None:
    """Return a registered model's arguments besides `SET_ELSEWHERE`; None: unknown."""
    signature = inspect.signature(class_of(name) or timm.model_entrypoint(name))
    parameters = signature.parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [
        parameter.name
        for parameter in parameters
        # A configuration cannot name a class.
        if parameter.name not in SET_ELSEWHERE and "type[" not in str(parameter.annotation)
    ]


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


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Keep parts of a network as they are: their parameters and their running statistics, with
    which their batch norms then normalise in training, too.

    Args:
        parts: Prefixes of parameter names: parts of the network such as ``stem``, its blocks such
            as ``blocks.0``, or parts of an adopted network such as ``net.layer1``.

    Raises:
        UserError: The network has no such part.
    """
    # Within a block, one layer may have two batch norms, which normalise alike.
    known = {
        name: part
        for name, part in model.named_modules()
        if name and name.rpartition(".")[0] in ("", "blocks", "net") and [*part.parameters()]
    }
    for name in parts:
        if name not in known:
            shown = [one for one in known if not one.startswith("blocks.")]
            shown = [f"{one} ({one}.N)" if f"{one}.0" in known else one for one in shown]
            raise UserError(
                f"model.freeze: {type(model).__name__} has no part {name!r}; it has "
                f"{', '.join(shown)}"
            )
        known[name].requires_grad_(False)
        for state in running_states(known[name]):
            state.frozen = True
            state.eval()
