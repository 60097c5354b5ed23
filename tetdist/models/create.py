"""A model of its name, with a neuron, a number of classes and T."""

from collections.abc import Mapping
from typing import Any

import timm

from tetdist.errors import UserError
from tetdist.models import SpikingNetwork
from tetdist.nn.neurons import NeuronConfig


def create_model(
    name: str,
    *,
    num_classes: int,
    timesteps: int,
    neuron: NeuronConfig,
    arguments: Mapping[str, Any],
) -> SpikingNetwork:
    """Build a registered model, initialised.

    Args:
        name: By which timm knows it.
        num_classes: K.
        timesteps: T.
        neuron: Of all its layers; networks that bring neurons of their own may ignore it.
        arguments: The model's further ones, `model.arguments` in a configuration.

    Raises:
        UserError: They do not suit the model, or it is not what the trainer asks of one.
    """
    try:
        model: SpikingNetwork = timm.create_model(
            name, num_classes=num_classes, timesteps=timesteps, neuron=neuron, **arguments
        )
    except UserError:
        raise
    except AttributeError as error:
        if "_model_args" not in str(error):  # timm notes it on what the function returns
            raise
        raise UserError(f"model.name: the function {name} must return a network") from error
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(
            f"model.arguments: {name} cannot be built with {dict(arguments)} ({error})"
        ) from error
    asked = ("timesteps", "set_timesteps", "num_classes", "input_kind")
    if missing := [attribute for attribute in asked if not hasattr(model, attribute)]:
        raise UserError(
            f"model.name: {name} is not a spiking model: it has no {missing[0]} "
            "(tetdist.models.SpikingModel lists what a model must have)"
        )
    return model
