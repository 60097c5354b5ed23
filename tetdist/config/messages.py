"""Error messages for mistakes in a configuration."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_origin

import pydantic
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tetdist.config.documentation import documented_keys, section_at
from tetdist.config.fields import Section
from tetdist.config.overrides import key_of
from tetdist.config.schema import RunConfig

_BOUNDS = {
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be {le} or less",
}


def sentences(
    error: pydantic.ValidationError,
    source: str,
    overrides: Sequence[str] = (),
    origins: Mapping[str, str] | None = None,
    root: type[BaseModel] = RunConfig,
) -> str:
    """Return all mistakes in a configuration, or in another file's section, as one message."""
    found = innermost([united(one) for outer in error.errors() for one in _opened(outer)])
    problems_by_origin: dict[str, list[str]] = {}
    for one in found:
        override = _override_of(one, overrides)
        problem = _explain(one, override, root)
        origin = override or _file_of(one, origins or {}) or source
        if override is not None and problem.startswith(f"{override} "):
            problems_by_origin[problem] = []  # it names the override itself
        else:
            problems_by_origin.setdefault(origin, []).append(problem)
    return "; ".join(
        ": ".join([origin, *filter(None, ["; ".join(dict.fromkeys(problems))])])
        for origin, problems in problems_by_origin.items()
    )


def united(error: Any) -> Any:
    """Return one error for a key of two types, for which pydantic has one each."""
    if error["loc"][:1] != ("recompute",):
        kinds = ("OptimizerSection", "literal['continue']")
        return error | {"loc": tuple(part for part in error["loc"] if part not in kinds)}
    message = "must be none, blocks or {timesteps: K} with a whole number K above 0"
    return {"loc": ("recompute",), "type": "union", "msg": message, "input": ...}


def innermost(errors: list[Any]) -> list[Any]:
    """Return the innermost errors of pydantic, without those of a list or mapping around them."""
    return [e for e in errors if not any(_contains(e, other) for other in errors)]


def _contains(error: Any, other: Any) -> bool:
    outer, inner = error["loc"], other["loc"]
    return len(outer) < len(inner) and inner[: len(outer)] == outer


def _opened(error: Any) -> list[Any]:
    """Return the errors within a neuron, which pydantic reports as one error."""
    match error["type"]:
        case "within":
            inside, known = error["ctx"]["errors"], error["ctx"]["known"]
            return [one | {"loc": (*error["loc"], *one["loc"]), "known": known} for one in inside]
        case "neuron_numbers":  # its text begins with the key
            key = re.split("[ :=]", error["msg"])[0]
            return [error | {"loc": (*error["loc"], key)}]
        case _:
            return [error]


def _override_of(error: Any, overrides: Sequence[str]) -> str | None:
    """Return the override that holds a mistake; None if it is in the file."""
    location = tuple(map(str, error["loc"]))
    for override in reversed(overrides):
        key = tuple(key_of(override).split("."))
        shorter = min(len(key), len(location))
        if shorter and key[:shorter] == location[:shorter]:
            return override
    return None


def _file_of(error: Any, origins: Mapping[str, str]) -> str | None:
    """Return the file that holds a mistake; None if unknown, as for a missing key."""
    return origins.get(".".join(map(str, error["loc"])))


def message_of(error: Any) -> str:
    """Return pydantic's message of an error, in fewer words if a value is out of its bounds."""
    if (text := _BOUNDS.get(error["type"])) is None:
        return str(error["msg"][0].lower() + error["msg"][1:])
    limits = {name: f"{v:g}" if isinstance(v, float) else v for name, v in error["ctx"].items()}
    return text.format(**limits)


def _explain(error: Any, override: str | None, root: type[BaseModel]) -> str:
    """Return one of pydantic's errors as a part of a sentence."""
    location = [str(part) for part in error["loc"]]
    dotted = ".".join(location)
    given = error["input"]
    match error["type"]:
        case "extra_forbidden":
            known = error.get("known") or _known_keys(location[:-1], root)
            every = [*documented_keys(), *known] if root is RunConfig else known
            return f"unknown key {dotted!r}; {_nearest(location, known, every)}"
        case "missing":
            return f"{dotted!r} is missing"
        case "neuron_numbers":
            return f"{'.'.join(location[:-1])}.{error['msg']}"
        case "model_type" | "neuron" if (section := section_at(location, root)) is not None:
            return _no_section(dotted, section, given, is_override=override is not None)
        case "tuple_type" | "list_type" if dotted == "phases":
            return f"{dotted!r} is a list; set a phase's keys, such as {dotted}.0.epochs"
    message = message_of(error)
    if error["type"] in _BOUNDS and override is not None and key_of(override) == dotted:
        return f"{override} {message}"
    is_whole = error["type"].startswith("neuron") or given is ... or isinstance(given, dict)
    shown = "" if is_whole else f", not {given!r}"
    return f"{dotted!r}: {message}{shown}"


def _nearest(location: list[str], known: list[str], every: list[str]) -> str:
    """Suggest the keys that an unknown key may have meant."""
    last, prefix = location[-1], "".join(f"{part}." for part in location[:-1])
    # The right word at a wrong place, or else a misspelt word at the right one.
    elsewhere = list(dict.fromkeys(place for key in every if (place := _place_of(last, key))))
    if elsewhere:
        return f"did you mean {' or '.join(map(repr, elsewhere[:3]))}?"
    if close := difflib.get_close_matches(last, known, n=1, cutoff=0.5):
        return f"did you mean {prefix + close[0]!r}?"
    return f"known keys: {', '.join(known)}"


def _place_of(word: str, key: str) -> str | None:
    """Return the dotted key or section that ends in a word of a documented key; None without."""
    parts = key.replace(".N.", ".0.").split(".")
    return ".".join(parts[: parts.index(word) + 1]) if word in parts else None


def _no_section(dotted: str, section: type[BaseModel], given: Any, *, is_override: bool) -> str:
    """Return the error of a value where a section belongs, with the key it may be meant for."""
    keys = [field.alias or name for name, field in section.model_fields.items()]
    problem = f"{dotted!r} holds keys ({', '.join(keys)}), not the value {given!r}"
    key = _key_for(section, given)
    if key is None:
        return problem
    written = f"{dotted}.{key}={given}" if is_override else f"{dotted}: {{{key}: {given}}}"
    return f"{problem}; did you mean {written}?"


def _key_for(section: type[BaseModel], value: Any) -> str | None:
    """Return the key of a section that a lone value most likely belongs to: the first that accepts
    it, with keys of fixed choices before required keys, and those before all others."""

    def order(field: FieldInfo) -> tuple[bool, bool]:
        return get_origin(field.annotation) is not Literal, not field.is_required()

    for name, field in sorted(section.model_fields.items(), key=lambda item: order(item[1])):
        alone: dict[str, Any] = {name: (field.annotation, field)}
        one = pydantic.create_model("One", __base__=Section, **alone)
        try:
            one.model_validate({name: value})
        except pydantic.ValidationError:
            continue
        return field.alias or name
    return None


def _known_keys(location: list[str], root: type[BaseModel]) -> list[str]:
    section = section_at(location, root)
    return [f.alias or n for n, f in section.model_fields.items()] if section else []
