"""Reading of typed keys and values that are no part of a run's configuration."""

import difflib
import json
from typing import Any, TypeVar

import pydantic

from tetdist.config.fields import Section
from tetdist.config.messages import message_of
from tetdist.errors import UserError

Kind = TypeVar("Kind", bound=Section)


def checked(kind: type[Kind], values: dict[str, Any], source: str) -> Kind:
    """Validate the keys and values of a section; errors name ``source``."""
    try:
        # Through JSON, because only then strict validation accepts a list as a tuple.
        return kind.model_validate_json(json.dumps(values))
    except pydantic.ValidationError as error:
        problems = "; ".join(_explain(one, list(kind.model_fields)) for one in error.errors())
        raise UserError(f"{source}: {problems}") from None


def _explain(error: Any, known: list[str]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {key!r}; {hint}"
    message = message_of(error)
    quoted = ", in quotes" if error["type"] == "string_type" else ""
    return f"{key!r}: {message}{quoted}, not {error['input']!r}"
