"""Validation of keys and values, and error messages for mistakes in them."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import pydantic
from pydantic import BaseModel

from tetdist import wording
from tetdist.config.documentation import documented_keys, keys_of, section_at
from tetdist.config.fields import Section
from tetdist.config.overrides import key_of
from tetdist.errors import UserError, WrongValue

Kind = TypeVar("Kind", bound=Section)

# Other projects' names, and the key to set instead.
_ELSEWHERE = {
    **dict.fromkeys(("t", "timesteps"), "set phases.0.timesteps"),
    "batch_size": "set batch.global",
    "data_dir": "set data.root",
    "learning_rate": "set phases.0.optimizer.lr",
    "output_dir": "set runs_dir",
    "resume": "leave it out: the same command continues a stopped run",
    "tau": "set model.neuron.decay to 1 - 1/tau",
    "warmup": "set phases.0.warmup_epochs",
}

_MESSAGES = {
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be {le} or less",
    "dict_type": "must hold keys and values, such as {{key: value}}",
    "string_type": "must be text, in quotes",
    "bool_type": "must be true or false",
    "literal_error": "must be {expected}",
}


def checked(
    section: type[Kind],
    values: dict[str, Any],
    source: str,
    overrides: Sequence[str] = (),
    origins: Mapping[str, str] | None = None,
) -> Kind:
    """Validate the keys and values of a section.

    Args:
        source: File of the values, as errors name it.
        overrides: Overrides that were applied; errors name one in place of ``source`` if the
            mistake is in it.
        origins: Files of the values, by dotted key, if not all are from ``source``.

    Raises:
        UserError: Some are wrong; the text names all mistakes.
    """
    with refusing(section, source, overrides, origins):
        # Through JSON, because only then strict validation accepts a list as a tuple.
        return section.model_validate_json(json.dumps(values))


@contextmanager
def refusing(
    section: type[Section],
    source: str,
    overrides: Sequence[str] = (),
    origins: Mapping[str, str] | None = None,
    place: Sequence[str] = (),
) -> Iterator[None]:
    """Turn an error about wrong values into a `UserError` that names each value's file or override.

    Args:
        source, overrides, origins: See `checked`.
        place: Parts of the dotted key below which values are validated.
    """
    try:
        yield
    except pydantic.ValidationError as error:
        mistakes = [_located(mistake, place) for mistake in error.errors()]
    except WrongValue as error:
        mistakes = [_contradiction(error, place)]
    else:
        return
    problems_by_origin: dict[str, list[str]] = {}
    bases = {file for file in (origins or {}).values() if file.endswith(".yaml")} - {source}
    hint = ""
    for mistake in mistakes:
        # Errors of a list or mapping around a mistake say nothing more.
        if any(
            _is_in(other["loc"], mistake["loc"]) and other["loc"] != mistake["loc"]
            for other in mistakes
        ):
            continue
        override = _override_of(mistake, overrides)
        problem = _explain(section, mistake, override)
        if mistake["type"] == "missing" and mistake["loc"][0] == "phases" and bases:
            hint = " (a list replaces the base's; to change some keys, write phases: {0: ...})"
        origin = override or (origins or {}).get(".".join(mistake["loc"])) or source
        if override is not None and problem.startswith((f"{override} ", f"{override}: ")):
            problems_by_origin[problem] = []  # it names the override itself
        else:
            problems_by_origin.setdefault(origin, []).append(problem)
    raise UserError(
        "; ".join(
            ": ".join([origin, *filter(None, ["; ".join(dict.fromkeys(problems))])])
            for origin, problems in problems_by_origin.items()
        )
        + hint
    )


def _located(error: Any, place: Sequence[str]) -> Any:
    """Return one of pydantic's errors with the location of the key that is wrong."""
    # If a key takes values of two types, pydantic adds the type after the key.
    parts = map(str, error["loc"])
    location = (*place, *(part for part in parts if not re.search(r"\[|Section$", part)))
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, WrongValue):
        return _contradiction(cause, location)
    return error | {"loc": location} | ({"msg": str(cause)} if cause else {})


def _contradiction(error: WrongValue, place: Sequence[str]) -> dict[str, Any]:
    location = (*place, *error.key.split("."))
    return {"type": "contradiction", "loc": location, "msg": error.text, "input": None}


def _is_in(inner: Sequence[str], outer: Sequence[str]) -> bool:
    return len(outer) > 0 and inner[: len(outer)] == outer


def _override_of(error: Any, overrides: Sequence[str]) -> str | None:
    """Return the override that holds a mistake; None if it is in the file."""
    location = error["loc"]
    for override in reversed(overrides):
        key = tuple(key_of(override).split("."))
        if _is_in(key, location) or _is_in(location, key):
            return override
    # A contradiction may be due to the other key that its text names.
    words = re.findall(r"[\w.]+", error["msg"]) if error["type"] == "contradiction" else []
    return next((override for override in overrides if key_of(override) in words), None)


def _explain(root: type[BaseModel], error: Any, override: str | None) -> str:
    """Return one of pydantic's errors as a part of a sentence."""
    location, dotted, value = error["loc"], ".".join(error["loc"]), error["input"]
    # The override is named before the problem, with its key and value.
    is_named = override is not None and key_of(override) == dotted
    match error["type"]:
        case "contradiction":
            return str(WrongValue(str(override) if is_named else dotted, error["msg"]))
        case "extra_forbidden":
            key = "unknown key" if is_named else f"unknown key {dotted!r}"
            if nested := location[-1].count("."):
                if "overrides" in keys_of(section_at(root, location[:-1]) or root):  # of a study
                    return f"{key}; write it in overrides: {{{location[-1]}: {json.dumps(value)}}}"
                written = f"{location[-1].replace('.', ': {')}: {json.dumps(value)}{'}' * nested}"
                return f"{key}; in a file write `{written}`; dotted keys are for the command line"
            # Below an unknown section, the last word may be right at another place.
            whole = key_of(override).split(".") if override else []
            hint = nearest(root, max([*location], whole, key=len))
            if isinstance(value, str):  # such as neuron=plif
                hint = re.sub(r"\.(neuron|optimizer)'", r".\1.kind'", hint)
            return f"{key}; {nearest(root, location) if hint.startswith('known') else hint}"
        case "missing":
            return f"{dotted!r} is missing"
        case "model_type" if (section := section_at(root, location)) is not None:
            keys = keys_of(section)
            known = f"{dotted!r} holds keys ({', '.join(keys)}), not the value {value!r}"
            usual = ["root" if "/" in str(value) else "kind", "kind", keys[0]]
            return f"{known}; set {dotted}.{next(k for k in usual if k in keys)}, for instance"
        case "tuple_type" | "list_type" if dotted == "phases":
            return f"{dotted!r} is a list; set a phase's keys, such as {dotted}.0.epochs"
    if is_named and value is None:
        return f"{override} has no value; give one, or leave it out"
    message = error["msg"][0].lower() + error["msg"][1:]
    if (text := _MESSAGES.get(error["type"])) is not None:
        context = error.get("ctx", {}).items()
        values = {k: f"{v:g}" if isinstance(v, float) else v for k, v in context}
        message = text.format(**values)
    elif error["type"] in ("int_type", "float_type", "tuple_type"):
        documented = documented_keys(root).get(re.sub(r"\.\d+\.", ".N.", dotted))
        takes = documented.takes if documented else "number"
        message = f"must be {'an' if takes.startswith('integer') else 'a'} {takes}"
        if documented and error["type"] == "tuple_type":
            example = f"such as [{json.dumps(value or 0)}]"  # right for a list of any length
            shown = documented.default if "," in documented.default else example
            message += f", in brackets ({shown})"
    if is_named:
        return f"{override} {message}" if message.startswith("must") else message
    shown = "" if isinstance(value, dict) else f", not {value!r}"
    return f"{dotted!r}: {message}{shown}"


def nearest(root: type[BaseModel], location: Sequence[str]) -> str:
    """Suggest the keys that an unknown key may have meant."""
    *place, last = [word.lower().replace("-", "_") for word in location]
    space = "write a space after each colon" if ":" in last else None
    if hint := _ELSEWHERE.get(last, space):
        return hint
    section, keys = section_at(root, place), documented_keys(root)
    known = keys_of(section or root)
    # The right word at a wrong place, or else a misspelt word.
    places = (_place_of(last, key) for key in keys)
    elsewhere = list(dict.fromkeys(filter(None, places)))
    in_place = [key for key in elsewhere if key.split(".")[0] in place]
    alike = filter(None, [wording.nearest(".".join([*place, last]), elsewhere, 0.8)])
    elsewhere = in_place or [*alike] or elsewhere
    if elsewhere:
        return f"did you mean {' or '.join(map(repr, elsewhere[:3]))}?"
    far = [] if place and section else [key.rpartition(".")[2] for key in keys]
    begun = [key for key in known if key.startswith(last)]
    near = (wording.nearest(last, words, 0.7) for words in (known, far))
    if close := next(filter(None, [*begun, *near]), None):
        if close not in known:
            return nearest(root, [*place, close])
        return f"did you mean {'.'.join([*(place if section else []), close])!r}?"
    own = f"did you mean {'.'.join([*place, 'arguments', last])}? " if "arguments" in known else ""
    return f"{own}known keys: {', '.join(known)}"


def _place_of(word: str, key: str) -> str | None:
    """Return the dotted key or section that ends in a word of a documented key; None without."""
    parts = key.replace(".N.", ".0.").split(".")
    return ".".join(parts[: parts.index(word) + 1]) if word in parts else None
