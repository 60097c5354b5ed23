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
from tetdist.config.overrides import covers, flatten, key_of
from tetdist.errors import UserError, WrongValue

Kind = TypeVar("Kind", bound=Section)

# Other projects' names, and the key to set instead.
_ELSEWHERE = {
    **dict.fromkeys(("t", "timesteps"), "set phases.0.timesteps"),
    "batch_size": "set batch.global",
    "checkpoint": "set save.every_steps, or init_checkpoint",
    "data_dir": "set data.root",
    "learning_rate": "set phases.0.optimizer.lr",
    "output_dir": "set runs_dir",
    "resume": "leave it out: the same command continues a stopped run",
    "tau": "set model.neuron.decay to 1 - 1/tau",
    "warmup": "set phases.0.warmup_epochs",
}

# Pydantic's words for other errors are clear.
_TYPES = {
    "dict_type": "must hold keys and values, such as {key: value}",
    "string_type": "must be text, in quotes",
    "too_short": "must not be empty",
    "tuple_type": "must be a list, in brackets",
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
        few = error.errors()[:50]  # suggestions for ten thousand unknown keys take minutes
        mistakes = [_mistake(section, details, place) for details in few]
    except WrongValue as error:
        mistakes = [error.within(*place)]
    else:
        return
    texts_by_origin: dict[str, list[str]] = {}
    for mistake in mistakes:
        # The error of a mapping around a mistake says nothing more.
        if any(other.key.startswith(f"{mistake.key}.") for other in mistakes):
            continue
        override = _override_of(mistake, overrides)
        origin = override or (origins or {}).get(mistake.key) or source
        # An override of the key itself already names it and its value.
        is_named = override is not None and key_of(override) == mistake.key
        texts_by_origin.setdefault(origin, []).append(mistake.text if is_named else str(mistake))
    parts = (f"{origin}: {'; '.join(texts)}" for origin, texts in texts_by_origin.items())
    raise UserError("; ".join(parts))


def _override_of(mistake: WrongValue, overrides: Sequence[str]) -> str | None:
    """Return the override that sets a mistaken key, a section around it or a key below it, or else
    another key that it contradicts; None if the mistake is in the file."""
    for override in reversed(overrides):
        key = key_of(override)
        if covers(key, mistake.key) or covers(mistake.key, key):
            return override
    return next((override for override in overrides if mistake.names(key_of(override))), None)


def _mistake(root: type[BaseModel], details: Any, place: Sequence[str]) -> WrongValue:
    """Turn one of pydantic's errors into that of the key, with its value and what it must be."""
    # If a key takes values of two types, pydantic adds the type after the key.
    parts = map(str, details["loc"])
    location = [*place, *(part for part in parts if not re.search(r"\[|Section$", part))]
    key, value, cause = ".".join(location), details["input"], details.get("ctx", {}).get("error")
    if isinstance(cause, WrongValue):
        return cause.within(*location)
    match details["type"]:
        case "extra_forbidden":
            return WrongValue(key, f"unknown key; {_right_key(root, location, value)}")
        case "missing":
            hint = " (a list replaces the base's; to change some keys, write phases: {0: ...}, or "
            hint += "phases.0.KEY=VALUE on the command line)"
            return WrongValue(key, f"is missing{hint if key.startswith('phases.') else ''}")
        case "model_type" if (section := section_at(root, location)) is not None:
            keys = keys_of(section)
            usual = ["root" if "/" in str(value) else "kind", "kind", keys[0]]
            example = f"set {key}.{next(k for k in usual if k in keys)}, for instance"
            return WrongValue(key, f"must hold keys ({', '.join(keys)}), not {value!r}; {example}")
        case "tuple_type" if isinstance(value, dict) and value:
            (item, new), *_ = flatten(value).items()
            change = f"to change a key of an item, set {key}.{item}={new}"
            return WrongValue(key, f"must be a list; {change}")
    if value is None:
        return WrongValue(key, "has no value; give one, or leave it out")
    text = str(cause or details["msg"].replace("Input should", "must"))
    shown = "" if isinstance(value, dict) else repr(value)
    return WrongValue(key, _TYPES.get(details["type"], text), shown)


def _right_key(root: type[BaseModel], location: Sequence[str], value: Any) -> str:
    """Suggest a key in place of an unknown one."""
    *place, last = location
    if nested := last.count("."):
        if "overrides" in keys_of(section_at(root, place) or root):  # of a study
            return f"write it in overrides: {{{last}: {json.dumps(value)}}}"
        written = f"{last.replace('.', ': {')}: {json.dumps(value)}{'}' * nested}"
        return f"in a file write `{written}`; dotted keys are for the command line"
    # Below an unknown section, the last word may be right at another place.
    whole = [*location]
    while isinstance(value, dict) and len(value) == 1:
        (word, value), *_ = value.items()
        whole.append(word)
    if (hint := nearest(root, whole)).startswith("known"):
        hint = nearest(root, location)
    # Such as neuron=plif.
    return re.sub(r"\.(neuron|optimizer)'", r".\1.kind'", hint) if isinstance(value, str) else hint


def nearest(root: type[BaseModel], location: Sequence[str]) -> str:
    """Suggest the keys that an unknown key may have meant."""
    *place, last = [word.lower().replace("-", "_") for word in location]
    if ":" in last:
        return "write a space after each colon"
    if last in _ELSEWHERE:
        return _ELSEWHERE[last]
    section = section_at(root, place)
    known = keys_of(section or root)
    keys = [key.replace(".N.", ".0.").split(".") for key in documented_keys(root)]
    # The right word at a wrong place.
    ending = (".".join(parts[: parts.index(last) + 1]) for parts in keys if last in parts)
    if elsewhere := list(dict.fromkeys(ending)):
        in_place = [key for key in elsewhere if not {*place}.isdisjoint(key.split("."))]
        alike = wording.nearest(".".join([*place, last]), elsewhere, 0.8)
        keys_meant = in_place or ([alike] if alike else elsewhere)
        return f"did you mean {' or '.join(map(repr, keys_meant[:3]))}?"
    # A misspelt or incomplete word: of the section, of others, or of another project.
    begun = (key for key in known if key.startswith(last))
    if close := next(begun, None) or wording.nearest(last, known, 0.7):
        return f"did you mean {'.'.join([*(place if section else []), close])!r}?"
    others = [] if place and section else [parts[-1] for parts in keys]
    if close := wording.nearest(last, others, 0.7):
        return nearest(root, [*place, close])
    if close := wording.nearest(last, _ELSEWHERE, 0.9):
        return _ELSEWHERE[close]
    own = f"did you mean {'.'.join([*place, 'arguments', last])}? " if "arguments" in known else ""
    return f"{own}known keys: {', '.join(known)}"
