"""Types of values, and the base of all sections of a configuration."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from tetdist.config.flags import MOST_PIXELS, MOST_TIMESTEPS
from tetdist.errors import WrongValue

MOST_PROFILED = 100  # steps
TIMM = "timm:"  # before the name of one of timm's networks, where a path could stand

# Larger values are typing errors, which C libraries would handle badly.
Positive = Annotated[int, Field(gt=0, le=10**9)]
Epochs = Annotated[int, Field(gt=0, le=10**6)]
Samples = Annotated[int, Field(gt=0, le=2**20)]
Timesteps = Annotated[int, Field(gt=0, le=MOST_TIMESTEPS)]
Pixels = Annotated[int, Field(gt=0, le=MOST_PIXELS)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# A fraction or probability below 1, since 1 would leave nothing.
OpenFraction = Annotated[float, Field(ge=0, lt=1)]


def _names(value: Any) -> Any:
    """Return a list of names, or a single name, as a tuple."""
    return (value,) if isinstance(value, str) else _as_tuple(value)


def _steps(value: Any) -> Any:
    """Parse the first and the last step from a pair or from text such as 20..30."""
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+)\.\.(\d+)", value)):
        return int(match[1]), int(match[2])
    pair = _as_tuple(value)
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise ValueError("must be the first and the last step, such as [20, 30] or 20..30")
    return pair


def _few_ascending(steps: tuple[int, int]) -> tuple[int, int]:
    first, last = steps
    if first > last:
        raise ValueError("must be the first and the last step, in this order")
    if last - first >= MOST_PROFILED:
        raise ValueError(
            f"must be at most {MOST_PROFILED} steps, because a trace of more is too large to open"
        )
    return steps


def _as_tuple(value: Any) -> Any:
    # Only JSON input would turn a list into a tuple; a validator's value is no longer JSON.
    return tuple(value) if isinstance(value, list) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
Steps = Annotated[
    tuple[Positive, Positive], BeforeValidator(_steps), AfterValidator(_few_ascending)
]


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Marks a text as a registered name; --explain lists the names."""

    names: Callable[[], Iterable[str]]


@contextmanager
def within(section: str) -> Iterator[None]:
    """Put the name of a section before the keys of wrong values that are in it."""
    try:
        yield
    except WrongValue as error:
        raise error.within(section) from error


class Section(BaseModel):
    # strict: "yes" is no bool and 1.5 no int; an int is accepted for a float.
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

    def with_value(self, key: str, value: Any) -> Self:
        """Return a copy with another value at a dotted key; the value is not checked."""
        name, _, inner = key.partition(".")
        if inner:
            value = getattr(self, name).with_value(inner, value)
        return self.model_copy(update={name: value})
