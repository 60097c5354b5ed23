"""Construction of a model from its name, neuron, number of classes and T."""

from collections.abc import Mapping
from typing import Any

import timm

from tetdist import models
from tetdist.errors import UserError
from tetdist.models import SpikingNetwork
from tetdist.models.base import Kind
from tetdist.nn.neurons import NeuronConfig
from tetdist.plugins import own_frames, raised_in


def create_model(
    name: str,
    *,
    num_classes: int,
    timesteps: int,
    neuron: NeuronConfig,
    input_kind: Kind,
    arguments: Mapping[str, Any],
) -> SpikingNetwork:
    """Build a registered model, initialised.

    Args:
        neuron: Neuron of all layers; networks with neurons of their own may ignore it.
        input_kind: Input of a network that takes images as well as events; others ignore it.
        arguments: The model's further arguments, `model.arguments` in a configuration.

    Raises:
        UserError: The arguments do not fit the model, or it lacks what the trainer needs.
    """
    if input_kind == "events" and models.takes_both(name):
        arguments = {**arguments, "input_kind": input_kind}
    try:
        model: SpikingNetwork = timm.create_model(
            name, num_classes=num_classes, timesteps=timesteps, neuron=neuron, **arguments
        )
    except UserError:
        raise
    except AttributeError as error:
        if "_model_args" not in str(error):  # timm sets it on the function's result
            raise
        raise UserError(f"model.name: the function {name} must return a network") from error
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        frames = own_frames(error)
        reason = raised_in(error, frames[-1].filename) if frames else error
        if "'pretrained" in str(error) or "'neuron'" in str(error):
            reason = f"{reason}; take neuron, pretrained=False and **_, but pass on neuron alone"
        raise UserError(
            f"model.arguments: {name} cannot be built with {dict(arguments)} ({reason})"
        ) from error
    required = ("timesteps", "set_timesteps", "num_classes", "input_kind")
    if missing := [attribute for attribute in required if not hasattr(model, attribute)]:
        raise UserError(
            f"model.name: {name} is not a spiking model: it has no {', no '.join(missing)} "
            "(tetdist.models.SpikingModel lists what a model must have)"
        )
    return model
