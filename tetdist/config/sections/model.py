"""The section ``model``: the network and its neuron."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Annotated, Any, Self

import pydantic
from pydantic import Field, PlainSerializer, PlainValidator

from tetdist import plugins
from tetdist.config import names
from tetdist.config.fields import Names, Section
from tetdist.config.sections.data import Kind
from tetdist.errors import WrongValue, typed
from tetdist.nn import neurons
from tetdist.nn.neurons import NEURONS, NeuronConfig
from tetdist.wording import meant

if TYPE_CHECKING:
    from tetdist.models import SpikingNetwork


def neuron_keys() -> type[Section]:
    """Return a section with the keys of all kinds of neurons, and values of any type."""
    names = [*(one.name for cls in NEURONS.values() for one in fields(cls)), "kind"]
    keys: Any = dict.fromkeys(names, (Any, None))
    section: type[Section] = pydantic.create_model("NeuronSection", __base__=Section, **keys)
    return section


_NO_KEYS: Any = {}


def _given(value: Any) -> Any:
    """Check the keys of a neuron and its kind, in a draft; the network completes them later."""
    if isinstance(value, NeuronConfig):
        return value
    given = neuron_keys().model_validate(value).model_dump(exclude_unset=True)
    if "kind" in given and (kind := str(given["kind"])) not in NEURONS:
        raise WrongValue("kind", plugins.none_of(NEURONS.what, kind, NEURONS))
    return given


def neuron_of(given: Mapping[str, Any], network: str) -> NeuronConfig:
    """Make the neuron of a network from the keys that are given.

    Raises:
        pydantic.ValidationError: A value has a wrong type, or is outside its range.
    """
    values = neurons.completed(given)
    if given.keys() != values.keys():  # else the network, whose import takes seconds, adds nothing
        values = neurons.completed(given, network_neuron(network))
    kind = neurons.class_of(values.pop("kind"))
    # Through JSON, because only then strict validation accepts a list as a tuple.
    return pydantic.TypeAdapter(kind).validate_json(json.dumps(values))


def network_neuron(network: str) -> NeuronConfig:
    """Return the published neuron of a network."""
    from tetdist import models

    return models.default_neuron(network)


class ModelSection(Section):
    name: str
    """Name of the network: one of `tetdist list networks`, or of your own (see imports)."""
    num_classes: Annotated[int, Field(gt=1, le=10**6)] | None = None
    """Number of classes; null: the number of the data set's classes."""
    # In a draft the keys that are given, until `neuron_of` makes the neuron.
    neuron: Annotated[
        NeuronConfig,
        PlainValidator(_given),
        PlainSerializer(neurons.as_dict),
        Field(validate_default=True),
    ] = _NO_KEYS
    """Neuron of all layers. Unset fields default to the network's published neuron."""
    arguments: dict[str, Any] = {}
    """Further arguments of the network, such as connect_function: add."""
    freeze: Names = ()
    """Parts of the network that keep their weights and running statistics, such as [stem, blocks.0,
    blocks.1]: to fine-tune the others from init_checkpoint."""
    mixes_samples: bool = False
    """Accept a network or neuron of your own with which a sample's logits depend on the rest of its
    batch; accuracy then depends on the order of samples. Such a network is refused otherwise."""

    @pydantic.model_validator(mode="after")
    def _refuse_an_unknown_network(self) -> Self:
        known: Sequence[str] = names.NETWORKS
        if plugins.PACKAGE in sys.modules:  # else no network needs to be imported
            from tetdist import models

            known = models.names()
        if self.name not in known:
            those = f"`{typed('list', 'networks')}` lists tetdist's"
            raise WrongValue("name", plugins.none_of("spiking network", self.name, known, those))
        return self

    def check_arguments(self) -> None:
        """Refuse arguments that the network lacks, which is imported for that."""
        from tetdist import models

        allowed = models.arguments_of(self.name)
        for key in self.arguments:
            if key in models.SET_ELSEWHERE:
                raise WrongValue(f"arguments.{key}", models.SET_ELSEWHERE[key])
            if allowed is not None and key not in allowed:
                hint = f"{meant(key, allowed)} (model.arguments={{}} drops a recipe's)"
                raise WrongValue(f"arguments.{key}", f"{self.name} has no such argument; {hint}")

    @property
    def changed_by_kind(self) -> dict[str, tuple[str, str]]:
        """Keys whose values come from the neuron's kind, if it differs from the network's own.

        Each has two values: the network's own, and the present one.
        """
        own, default = network_neuron(self.name), type(self.neuron)()
        if type(own) is type(default):
            return {}
        was, now, of_kind = (
            {key: json.dumps(value).strip('"') for key, value in asdict(one).items()}
            for one in (own, self.neuron, default)
        )
        return {k: (was[k], v) for k, v in now.items() if was.get(k, v) != v == of_kind[k]}

    def build(
        self, *, num_classes: int, timesteps: int, input_kind: Kind = "images"
    ) -> "SpikingNetwork":
        """Make the model, initialised; see `create_model`."""
        from tetdist.models.create import create_model

        return create_model(
            self.name,
            num_classes=num_classes,
            timesteps=timesteps,
            neuron=self.neuron,
            input_kind=input_kind,
            arguments=self.arguments,
        )

    @property
    def has_own_neuron(self) -> bool:
        """True if the neuron is of an imported file."""
        return not type(self.neuron).__module__.startswith("tetdist.")

    @property
    def is_own(self) -> bool:
        """True if the network or its neuron is of an imported file."""
        import timm

        maker = timm.model_entrypoint(self.name)
        return self.has_own_neuron or not maker.__module__.startswith("tetdist.")

    def check_own(self, model: "SpikingNetwork", shape: Sequence[int]) -> None:
        """Check a user's network or neuron; see `separate.py`."""
        from tetdist.models.separate import check_network, check_neuron

        if self.has_own_neuron:
            check_neuron(self.neuron, model.timesteps)
        if self.is_own:
            check_network(self.name, model, shape, may_mix=self.mixes_samples)
