"""RandAugment in timm's notation, such as rand-m9-mstd0.5-inc1."""

import re
from typing import NamedTuple

EXAMPLE = "rand-m9-mstd0.5-inc1"


class RandAugment(NamedTuple):
    """Random operations on an image, all of the same strength (Cubuk et al., 2020).

    Attributes:
        m: Magnitude: the strength of the operations.
        n: Number of operations drawn for an image; the same one may be drawn twice.
        p: Probability of applying each drawn operation.
        mstd: Standard deviation of the magnitude; above 100 it is uniform from 0 to m.
        mmax: Largest magnitude. The operations are defined up to 10.
        inc: True if all operations get stronger with the magnitude; otherwise posterize and
            solarize get weaker, and colours change least at 5.
    """

    m: float = 10.0
    n: int = 2
    p: float = 0.5
    mstd: float = 0.0
    mmax: float = 10.0
    inc: bool = False


# Least and greatest value of each key, and whether it is an integer.
_BOUNDS = {
    "m": (0, 100, True),
    "n": (1, 15, True),
    "p": (0, 1, False),
    "mstd": (0, 1000, False),
    "mmax": (1, 100, True),
    "inc": (0, 1, True),
}


def rand_augment(text: str) -> RandAugment:
    """Parse a policy's text that begins with "rand".

    Raises:
        ValueError: A part is unknown, out of bounds, or given twice; the message says what is
            allowed.
    """
    values: dict[str, float] = {}
    for part in text.split("-")[1:]:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
        if match is None or match[1] not in _BOUNDS:
            *known, last = _BOUNDS
            raise ValueError(
                f"must consist of {', '.join(known)} and {last}, each with a number, as in "
                f"{EXAMPLE} (unknown: {part!r})"
            )
        key, value = match[1], float(match[2])
        low, high, is_whole = _BOUNDS[key]
        if not low <= value <= high or (is_whole and not value.is_integer()):
            kind = "an integer" if is_whole else "a number"
            raise ValueError(f"must have {key} as {kind} from {low} to {high}")
        if key in values:
            raise ValueError(f"must have {key} once")
        values[key] = value
    if values.get("m", 0) > values.get("mmax", 10):
        raise ValueError(f"must have m of at most {values.get('mmax', 10):g}, or a larger mmax")
    n, inc = int(values.pop("n", 2)), bool(values.pop("inc", 0))
    return RandAugment(**values, n=n, inc=inc)
