"""The sentences in which a configuration's mistakes are told, and the documentation of its keys."""

import difflib
from typing import Any, get_args

from pydantic import BaseModel

from tetdist.config.schema import PhaseSection, RunConfig, neuron_section_of
from tetdist.nn.neurons import NEURONS, NeuronConfig


def united(error: Any) -> Any:
    """One sentence for a key of two kinds, of which pydantic complains once a kind."""
    if error["loc"][0] != "recompute":
        return error
    message = "must be none, blocks or {timesteps: K} with a whole number K above 0"
    return {"loc": ("recompute",), "type": "union", "msg": message, "input": ...}


def innermost(errors: list[Any]) -> list[Any]:
    """Those of pydantic's errors that say enough: it also calls a list too short, and a mapping
    too small, of which an item is wrong."""
    return [e for e in errors if not any(_contains(e, other) for other in errors)]


def _contains(error: Any, other: Any) -> bool:
    outer, inner = error["loc"], other["loc"]
    return len(outer) < len(inner) and inner[: len(outer)] == outer


def explain(error: Any, known: list[str] | None = None) -> str:
    """One of pydantic's errors as a sentence part; ``known`` are the keys beside a mistaken one."""
    if error["type"] == "within":
        inside = error["ctx"]["errors"]
        moved = [one | {"loc": (*error["loc"], *one["loc"])} for one in inside]
        return "; ".join(explain(one, error["ctx"]["known"]) for one in moved)
    location = [str(part) for part in error["loc"]]
    dotted = ".".join(location)
    if error["type"] == "extra_forbidden":
        known = known or _known_keys(location[:-1])
        every = [*documented_keys(), *known]
        prefix = "".join(f"{part}." for part in location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        anywhere = [k for k in every if k.split(".")[-1] == location[-1]]
        if close:
            return f"unknown key {dotted!r}; the nearest known one is {prefix + close[0]!r}"
        if anywhere:
            return f"unknown key {dotted!r}; there is {anywhere[0]!r}"
        return f"unknown key {dotted!r}; known here are {', '.join(known)}"
    if error["type"] == "missing":
        return f"{dotted!r} is missing"
    if error["type"] == "neuron_numbers":
        return f"{dotted}.{error['msg']}"  # it begins with the key
    message = error["msg"][0].lower() + error["msg"][1:]
    given = error["input"]
    is_whole = error["type"].startswith("neuron") or given is ... or isinstance(given, dict)
    shown = "" if is_whole else f", not {given!r}"
    return f"{dotted!r}: {message}{shown}"


def _section_at(location: list[str]) -> type[BaseModel] | None:
    section: type[BaseModel] = RunConfig
    for part in location:
        if part.isdigit():
            continue
        field = next((f for n, f in section.model_fields.items() if part in (n, f.alias)), None)
        found = _section_in(field.annotation) if field else None
        if found is None:
            return None
        section = found
    return section


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if annotation is NeuronConfig:
        return neuron_section_of("lif")
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((s for a in get_args(annotation) if (s := _section_in(a))), None)


def _known_keys(location: list[str]) -> list[str]:
    section = _section_at(location)
    return [f.alias or n for n, f in section.model_fields.items()] if section else []


def documented_keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> dict[str, str]:
    """Every key of the configuration, dotted (list items as ``N``), with its documentation."""
    keys: dict[str, str] = {}
    for name, field in section.model_fields.items():
        dotted = f"{prefix}{field.alias or name}"
        if field.annotation is NeuronConfig:
            keys[f"{dotted}.kind"] = f"{', '.join(NEURONS)}, or one of your own; see imports."
            for kind in NEURONS:
                keys = keys | documented_keys(neuron_section_of(kind), f"{dotted}.") | keys
            continue
        inner = _section_in(field.annotation)
        if inner is None or field.description:
            keys[dotted] = field.description or ""
        if inner is None:
            continue
        if inner is PhaseSection:
            keys |= documented_keys(inner, f"{dotted}.N.")
        else:
            keys |= documented_keys(inner, f"{dotted}.")
    return keys
