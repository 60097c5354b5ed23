"""Types of values, and the base of all sections of a configuration."""

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from tetdist.config.flags import MOST_PIXELS, MOST_TIMESTEPS

TIMM = "timm:"  # before the name of one of timm's networks, where a path could stand


# What is larger is a slip of the finger, which libraries of C would answer otherwise.
Positive = Annotated[int, Field(gt=0, le=10**9)]
Epochs = Annotated[int, Field(gt=0, le=10**6)]
Samples = Annotated[int, Field(gt=0, le=2**20)]
Timesteps = Annotated[int, Field(gt=0, le=MOST_TIMESTEPS)]
Pixels = Annotated[int, Field(gt=0, le=MOST_PIXELS)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# A probability below 1: a share of 1 would leave nothing.
Share = Annotated[float, Field(ge=0, lt=1)]


def _names(value: Any) -> Any:
    """A list of names as a tuple, to which a single name is one of one name."""
    return (value,) if isinstance(value, str) else _as_tuple(value)


def _steps(value: Any) -> Any:
    """The first and the last step of a pair, or of text such as 20..30.

    Raises:
        PydanticCustomError: It is neither.
    """
    if isinstance(value, str) and (found := re.fullmatch(r"(\d+)\.\.(\d+)", value)):
        return int(found[1]), int(found[2])
    pair = _as_tuple(value)
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise PydanticCustomError(
            "steps", "must be the first and the last step, such as [20, 30] or 20..30"
        )
    return pair


def _as_tuple(value: Any) -> Any:
    # What a validator has been given is no JSON any more, where a list is taken for a tuple.
    return tuple(value) if isinstance(value, list) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]


Steps = Annotated[tuple[Positive, Positive], BeforeValidator(_steps)]


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Says of a text that it is the name of something registered: those that --explain lists."""

    names: Callable[[], Iterable[str]]


class Section(BaseModel):
    # strict: "yes" is no bool and 1.5 no int; an int where a float is asked is fine.
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        populate_by_name=True,
        serialize_by_alias=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
