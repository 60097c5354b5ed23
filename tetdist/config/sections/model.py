"""The section ``model``: the network and its neuron."""

import dataclasses
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Self, get_type_hints

import pydantic
from pydantic import Field, PlainSerializer, PlainValidator, ValidationInfo

from tetdist import plugins
from tetdist.config import names
from tetdist.config.fields import KEYS_ALONE, Names, OneOf, Section
from tetdist.config.sections.data import Kind
from tetdist.errors import typed
from tetdist.nn import neurons
from tetdist.nn.neurons import LIF, NEURONS, NeuronConfig
from tetdist.wording import meant

if TYPE_CHECKING:
    from tetdist.models import SpikingNetwork


def neuron_section(kind: str) -> type[Section]:
    """Return the keys of a kind of neuron: its class's fields, and ``kind``."""
    cls: Any = neurons.class_of(kind)
    return _section_of(cls)


@functools.cache
def _section_of(cls: Any) -> type[Section]:
    hints, keys = get_type_hints(cls), dict[str, Any]()
    for one in dataclasses.fields(cls):
        described = Field(
            default=one.default, description=one.metadata["doc"], **one.metadata["bounds"]
        )
        keys[one.name] = (hints[one.name], described)
    described = Field(
        default="lif",
        description=(
            "Kind of neuron, or the name of your own (see imports). lif: leaky integrate-and-fire; "
            "ilif, nilif: up to most_spikes spikes per timestep; plif: lif with a learnt decay; "
            "psn, masked_psn, sliding_psn: parallel, without reset; relu: max(0, input). Unset "
            "keys have the values of the network's paper; another kind that you set has its own."
        ),
    )
    keys["kind"] = (Annotated[str, OneOf(lambda: NEURONS)], described)
    made: type[Section] = pydantic.create_model(f"{cls.__name__}Section", __base__=Section, **keys)
    return made


def _neuron(value: Any, info: ValidationInfo) -> NeuronConfig:
    """Make a neuron from a mapping of its kind and numbers."""
    if isinstance(value, NeuronConfig):
        return value
    kind = value.get("kind", "lif") if isinstance(value, dict) else "lif"
    if kind not in NEURONS:
        raise ValueError(f"kind: {plugins.none_of(NEURONS.what, str(kind), NEURONS)}")
    if info.context == KEYS_ALONE and isinstance(value, dict):
        # The network sets the default kind, and values of keys that are not given.
        of_any = {key for one in NEURONS for key in neuron_section(one).model_fields}
        value = {key: number for key, number in value.items() if key not in of_any}
    numbers = dict(neuron_section(kind).model_validate_json(json.dumps(value)))
    return NEURONS[kind](**{key: number for key, number in numbers.items() if key != "kind"})


Neuron = Annotated[NeuronConfig, PlainValidator(_neuron), PlainSerializer(neurons.as_dict)]


def network_neuron(model: Mapping[str, Any]) -> NeuronConfig:
    """Return the published neuron of the network in a `model:` section.

    It is LIF for an unknown network, which `ModelSection` refuses.
    """
    import timm

    from tetdist import models

    name = model.get("name")
    if not isinstance(name, str) or not timm.is_model(name):
        return LIF()
    return models.default_neuron(name)


class ModelSection(Section):
    name: str
    """Name of the network: one of `tetdist list networks`, or of your own (see imports)."""
    num_classes: Annotated[int, Field(gt=1)] | None = None
    """Number of classes; null: the number of the data set's classes."""
    neuron: Neuron
    """Neuron of all layers. Unset fields default to the network's published neuron."""
    arguments: dict[str, Any] = {}
    """Further arguments of the network, such as connect_function: add."""
    freeze: Names = ()
    """Parts of the network that keep their weights and running statistics, such as [stem, blocks.0,
    blocks.1]: to fine-tune the others from init_checkpoint."""
    mixes_samples: bool = False
    """Accept a network or neuron of your own with which a sample's logits depend on the rest of its
    batch; accuracy then depends on the order of samples. Such a network is refused otherwise."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _with_whole_neuron(cls, values: Any, info: ValidationInfo) -> Any:
        if not isinstance(values, dict):
            return values
        neuron = values.get("neuron", {})
        if not isinstance(neuron, dict):
            return values
        if info.context == KEYS_ALONE:
            return values | {"neuron": neuron}
        return values | {"neuron": neurons.completed(neuron, network_neuron(values))}

    @pydantic.model_validator(mode="after")
    def _refuse_what_the_network_lacks(self, info: ValidationInfo) -> Self:
        known: Sequence[str] = names.NETWORKS
        if plugins.PACKAGE in sys.modules:  # else no network needs to be imported
            from tetdist import models

            known = models.names()
        if self.name not in known:
            those = f"`{typed('list', 'networks')}` lists tetdist's"
            raise ValueError(f"name: {plugins.none_of('spiking network', self.name, known, those)}")
        if info.context == KEYS_ALONE:
            return self
        from tetdist import models

        allowed = models.arguments_of(self.name)
        for key in self.arguments:
            if key in ("num_classes", "neuron", "timesteps"):
                own = "phases.N.timesteps" if key == "timesteps" else f"model.{key}"
                raise ValueError(f"arguments.{key}: set {own} instead")
            if allowed is not None and key not in allowed:
                hint = f"{meant(key, allowed)} (model.arguments={{}} drops a recipe's)"
                raise ValueError(f"arguments.{key}: {self.name} has no such argument; {hint}")
        return self

    @property
    def changed_by_kind(self) -> dict[str, tuple[str, str]]:
        """Keys whose values come from the neuron's kind, if it differs from the network's own.

        Each has two values: the network's own, and the present one.
        """
        own, default = network_neuron({"name": self.name}), type(self.neuron)()
        if type(own) is type(default):
            return {}
        was, now, of_kind = (
            {key: json.dumps(value).strip('"') for key, value in dataclasses.asdict(one).items()}
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

    def refuse_mixing(self, model: "SpikingNetwork", shape: Sequence[int]) -> None:
        """Refuse a user's network or neuron that mixes samples or is wrong; see `separate.py`."""
        import timm

        from tetdist.models.separate import check_neuron, refuse_mixing

        makers = (timm.model_entrypoint(self.name), type(self.neuron))
        foreign = [not maker.__module__.startswith("tetdist.") for maker in makers]
        if foreign[1]:
            check_neuron(self.neuron, model.timesteps)
        if any(foreign) and not self.mixes_samples:
            refuse_mixing(self.name, model, shape)
