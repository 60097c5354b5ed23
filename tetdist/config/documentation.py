"""The documentation of each key that --explain shows, made from the schema."""

import json
from collections.abc import Sequence
from dataclasses import fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import annotated_types
import pydantic
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tetdist.config.fields import OneOf
from tetdist.config.schema import RunConfig
from tetdist.config.sections.model import neuron_keys
from tetdist.nn.neurons import NEURONS, NeuronConfig, class_of

_PLAIN = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "text",
    NoneType: "null",
}
# Keys whose default no field has.
_DEFAULTS = {"name": "default: the file's name"}
_DEFAULTS["phases.N.loss"] = "default: the run's loss"
_BOUNDS = {annotated_types.Gt: "> {0.gt}", annotated_types.Ge: ">= {0.ge}"}
_BOUNDS |= {annotated_types.Lt: "< {0.lt}", annotated_types.Le: "<= {0.le}"}


class Documented(NamedTuple):
    """The documentation of a key: allowed values, default, and meaning."""

    takes: str
    default: str
    meaning: str

    def __str__(self) -> str:
        return f"[{self.takes}; {self.default}] {' '.join(self.meaning.split())}".rstrip()


_KIND = Documented(
    "name",
    "default: the network's own",
    "Kind of neuron, or the name of your own (see imports). lif: leaky integrate-and-fire; ilif, "
    "nilif: up to most_spikes spikes per timestep; plif: lif with a learnt decay; psn, masked_psn, "
    "sliding_psn: parallel, without reset; relu: max(0, input). Unset keys have the values of the "
    "network's paper; another kind that you set has its own.",
)


def documented_keys(
    section: type[BaseModel] = RunConfig, prefix: str = ""
) -> dict[str, Documented]:
    """Return the documentation of each key, by its dotted name (list items as ``N``, keys of a free
    mapping as ``NAME``)."""
    keys: dict[str, Documented] = {}
    for name, field in section.model_fields.items():
        dotted = f"{prefix}{field.alias or name}"
        if field.annotation is NeuronConfig:
            keys |= _of_all_kinds(f"{dotted}.") | {
                f"{dotted}.kind": _KIND._replace(takes=" | ".join(NEURONS))
            }
            continue
        inner = _section_in(field.annotation)
        if inner is None or field.description:
            keys[dotted] = _documented(dotted, field)
        if inner is not None and dotted != "phases.N.loss":
            origin = get_origin(field.annotation)
            item = "N." if origin is tuple else "NAME." if origin is dict else ""
            keys |= documented_keys(inner, f"{dotted}.{item}")
    return keys


def _of_all_kinds(prefix: str) -> dict[str, Documented]:
    """Document the keys of all kinds of neurons; a text names the kinds if only some have the key,
    or if they differ in its default or its allowed values."""
    by_key: dict[str, dict[str, Documented]] = {}
    for kind in NEURONS:
        types = get_type_hints(class_of(kind))
        for one in fields(class_of(kind)):
            bounds = FieldInfo(**one.metadata["bounds"]).metadata
            takes, default = _takes(types[one.name], bounds), _default(one.default)
            documented = Documented(takes, default, one.metadata["doc"])
            by_key.setdefault(f"{prefix}{one.name}", {})[kind] = documented
    merged = {}
    for key, of_kinds in by_key.items():
        (first, *_), meaning = of_kinds.values(), ""
        if "lif" not in of_kinds:
            meaning = f"(kind={' or '.join(of_kinds)} only) "
        meaning += first.meaning
        for part, verb in (("takes", "allowed values are:"), ("default", "default is")):
            kinds_by_text: dict[str, list[str]] = {}
            for kind, documented in of_kinds.items():
                kinds_by_text.setdefault(getattr(documented, part), []).append(kind)
            for text, kinds in list(kinds_by_text.items())[1:]:
                text = text.removeprefix("default ")
                meaning += f" With kind={' or '.join(kinds)}, the {verb} {text}."
        merged[key] = first._replace(meaning=meaning)
    return merged


def keys_of(section: type[BaseModel]) -> list[str]:
    """Return the names of a section's keys."""
    return [field.alias or name for name, field in section.model_fields.items()]


def section_at(root: type[BaseModel], location: Sequence[str]) -> type[BaseModel] | None:
    """Return the section at a dotted key below ``root``; None if there is none.

    Numbers of a list's items and keys of a free mapping are parts of the dotted key.
    """
    section, parts = root, iter(location)
    for part in parts:
        field = next((f for n, f in section.model_fields.items() if part in (n, f.alias)), None)
        inner = _section_in(field.annotation) if field else None
        if field is None or inner is None:
            return None
        section = inner
        if get_origin(field.annotation) in (tuple, dict):
            next(parts, None)
    return section


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if annotation is NeuronConfig:
        return neuron_keys()
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((s for a in get_args(annotation) if (s := _section_in(a))), None)


def _documented(key: str, field: FieldInfo) -> Documented:
    default = _DEFAULTS.get(key, "required")
    if default == "required" and not field.is_required():
        default = _default(field.get_default(call_default_factory=True))
    return Documented(_takes(field.annotation, field.metadata), default, field.description or "")


def _default(value: Any) -> str:
    plain = pydantic.TypeAdapter(Any).dump_python(value, mode="json")
    return f"default {plain if isinstance(plain, str) and plain else json.dumps(plain)}"


def _takes(annotation: Any, about: Sequence[Any] = ()) -> str:
    """Describe the values that a type accepts, as in "integer > 0 or null"."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        of_fields = [one.metadata if isinstance(one, FieldInfo) else [one] for one in inside[1:]]
        return _takes(inside[0], [*about, *(one for ones in of_fields for one in ones)])
    for one in about:
        if isinstance(one, OneOf):
            return " | ".join(one.names())
    if origin is Literal:
        return " | ".join(map(str, inside))
    if origin in (Union, UnionType):
        return " or ".join(_takes(one, about) for one in inside)
    if origin is tuple:
        kind = _takes(inside[0]).replace("number", "numbers").replace("integer", "integers")
        several = f"list of {len(inside)} {kind}"
        return f"list: {_takes(inside[0])}" if inside[-1] is ... else several
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"{{{', '.join(keys_of(annotation))}}}"
    if origin is dict:
        return "keys and values"
    bounds = (_BOUNDS[type(one)].format(one) for one in about if type(one) in _BOUNDS)
    return " ".join([_PLAIN.get(annotation, "value"), " and ".join(bounds)]).rstrip()
