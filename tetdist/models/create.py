"""A model of its name, with a neuron, a number of classes and T."""

import timm

from tetdist.config.schema import ModelSection
from tetdist.errors import UserError
from tetdist.models import SpikingNetwork


def create_model(section: ModelSection, num_classes: int, timesteps: int) -> SpikingNetwork:
    """The configured model, initialised.

    Raises:
        UserError: ``model.arguments`` does not suit it.
    """
    try:
        model: SpikingNetwork = timm.create_model(
            section.name,
            num_classes=num_classes,
            timesteps=timesteps,
            neuron=section.neuron.model_dump(),
            **section.arguments,
        )
    except UserError:
        raise
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(
            f"model.arguments: {section.name} cannot be built with {section.arguments} ({error})"
        ) from error
    return model
